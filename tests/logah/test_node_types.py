"""Kinds of nodes."""

import pytest
import torchvision
from torch import nn

from logah.node_types import is_supported, module_kind, node_type, operation_kind
from logah.operation_graph import Record
from logah.primitives import PRIMITIVES


@pytest.mark.parametrize(
    "module, name, kind",
    [
        (nn.Conv2d(4, 4, 3), "a.weight", "conv"),
        (nn.Conv2d(4, 4, 3), "a.bias", "bias"),
        (nn.Conv2d(4, 4, 3, groups=2), "a.weight", "sep_conv"),
        (nn.Conv2d(4, 4, 3, groups=4, dilation=2), "a.weight", "dil_conv"),
        (nn.Conv2d(4, 4, 3, dilation=2), "a.weight", "conv"),
        (nn.Linear(2, 2), "fc.weight", "conv"),
        (nn.MultiheadAttention(4, 2), "attn.in_proj_bias", "bias"),
        (nn.MultiheadAttention(4, 2), "attn.in_proj_weight", "conv"),
        (nn.BatchNorm2d(2), "bn.weight", "bn"),
        (torchvision.models.convnext.LayerNorm2d(2), "ln.weight", "ln"),
        (nn.RMSNorm(2), "norm.weight", "rmsnorm"),
        (nn.Embedding(2, 2), "wte.weight", "pos_enc"),
        (nn.PReLU(), "act.weight", None),
    ],
)
def test_modules_have_the_kind_of_the_table(module, name, kind):
    assert module_kind(module, name) == kind


@pytest.mark.parametrize(
    "name, vision, llm",
    [
        ("MulBackward0", "cse", "gate"),
        ("NegBackward0", None, "rot_emb"),
        ("MeanBackward1", "glob_avg", "glob_avg"),
        ("AdaptiveAvgPool2DBackward0", "glob_avg", "glob_avg"),
        ("SoftmaxBackward0", "msa", "msa"),
        ("AddmmBackward0", None, None),
        ("input", "input", "input"),
    ],
)
def test_operations_have_the_kind_of_the_variant(name, vision, llm):
    assert (operation_kind(name, "vision"), operation_kind(name, "llm")) == (vision, llm)


def test_what_has_no_kind_is_shown_as_a_sum():
    assert PRIMITIVES[node_type(Record("TanhBackward0"), "vision")] == "sum"


def test_the_bias_of_a_norm_belongs_to_its_weight():
    assert not is_supported(Record("bn.bias", nn.BatchNorm2d(2), (2,)), "vision")
    assert is_supported(Record("fc.bias", nn.Linear(2, 2), (2,)), "vision")
