"""Statistics over checkpoints and the checks that come before them."""

import math

import pytest
import torch

from common.errors import ConfigError, DataError
from rpg.structure import compute_structure, structure_of_shapes


def test_statistics_are_means_over_checkpoints_of_unbiased_moments():
    checkpoints = [{"w": torch.randn(6, 5) * k + k} for k in (1, 2, 3)]
    (entry,) = compute_structure(iter(checkpoints)).entries
    assert math.isclose(entry.mean, sum(c["w"].mean().item() for c in checkpoints) / 3, rel_tol=1e-5)
    assert math.isclose(entry.std, sum(c["w"].std().item() for c in checkpoints) / 3, rel_tol=1e-5)


def test_which_tensors_vary():
    state = {"w": torch.randn(3), "n": torch.tensor([1, 2]), "one": torch.randn(1), "none": torch.empty(0)}
    state["bn.num_batches_tracked"] = torch.zeros(2)
    kinds = {entry.name: entry.kind for entry in compute_structure([state]).entries}
    assert kinds == {"w": "varying"} | dict.fromkeys(("n", "one", "none", "bn.num_batches_tracked"), "constant")


def test_a_tie_holds_only_if_it_holds_in_every_checkpoint():
    one, two = torch.randn(4), torch.randn(4)
    tied, stored_twice = {"a": one, "b": one}, {"a": two, "b": two.clone()}
    untied = {"a": one, "b": two}
    assert compute_structure([tied, stored_twice]).entries[1].alias_of == "a"
    assert compute_structure([tied, untied]).entries[1].kind == "varying"
    assert compute_structure([{"a": torch.ones(3), "b": torch.ones(3)}]).entries[1].kind == "varying"


def test_ties_are_found_on_meta_tensors():
    with torch.device("meta"):
        weight = torch.empty(5, 4)
    entries = structure_of_shapes({"a": weight, "b": weight, "c": torch.empty(5, 4, device="meta")}).entries
    assert [entry.kind for entry in entries] == ["varying", "alias", "varying"]


FIRST = {"a": torch.randn(3), "b": torch.randn(2, 2)}
DIFFERENT = [
    ({"a": FIRST["a"]}, r"second\.pth has no key 'b', which first\.pth has with shape \(2, 2\)"),
    ({**FIRST, "c": torch.randn(5)}, r"second\.pth has the key 'c' with shape \(5,\), which first\.pth has not"),
    ({**FIRST, "b": torch.randn(2, 3)}, r"second\.pth: key 'b' has shape \(2, 3\), but \(2, 2\) in first\.pth"),
    ({**FIRST, "b": torch.randn(2, 2).half()}, r"second\.pth: key 'b' has dtype float16, but float32 in first\.pth"),
    ({**FIRST, "a": torch.tensor([1.0, math.nan, math.inf])}, r"second\.pth: key 'a' holds 2 values that are NaN"),
    ({**FIRST, "a": "text"}, r"second\.pth: key 'a' is of type str"),
    ({}, r"second\.pth holds no tensor"),
]


@pytest.mark.parametrize("second, message", DIFFERENT)
def test_checkpoints_that_do_not_belong_together_are_named(second, message):
    with pytest.raises(DataError, match=message):
        compute_structure([FIRST, second], names=["first.pth", "second.pth"])


def test_a_constant_that_is_not_finite_is_named():
    with pytest.raises(DataError, match="key 'temperature' holds 1 value"):
        compute_structure([{"temperature": torch.tensor(math.nan), "w": torch.randn(3)}])


def test_no_checkpoint_and_unknown_normalisation():
    with pytest.raises(DataError, match="no checkpoint"):
        compute_structure([])
    with pytest.raises(ConfigError, match="data.normalisation='layers'.*Did you mean 'layer'"):
        compute_structure([FIRST], "layers")
