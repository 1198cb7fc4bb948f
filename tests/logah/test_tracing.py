"""Graphs of networks: real and meta tensors, options, refusals."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import ConfigError
from logah.architectures import gpt2, llama, vit
from logah.meta_building import build_on_meta
from logah.tracing import trace
from tests.logah.golden_graphs import SmallConvNet

CLASSIFIERS = {
    "alexnet": 96, "convnext_tiny": 64, "densenet121": 32, "efficientnet_b0": 32, "googlenet": 32,
    "mnasnet0_5": 32, "regnet_y_400mf": 32, "resnet50": 32, "shufflenet_v2_x0_5": 32, "swin_t": 64, "swin_v2_t": 64,
    "vgg11_bn": 32,
}  # fmt: skip


def classifier(name):
    options = {"init_weights": False} if name == "googlenet" else {}
    return build_on_meta(lambda: getattr(torchvision.models, name)(**options))


def assert_same(first, second):
    assert first.nodes == second.nodes
    np.testing.assert_array_equal(first.distance_NN, second.distance_NN)


def edges(graph):
    return {
        (graph.nodes[s].name, graph.nodes[t].name) for s, t in zip(*np.nonzero(graph.distance_NN == 1), strict=True)
    }


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_have_the_same_graph_on_meta(name):
    on_meta = trace(classifier(name), image_size=CLASSIFIERS[name])
    real = classifier(name).to_empty(device="cpu")  # the numbers do not matter, NaN included, but indices do
    for buffer in real.buffers():
        buffer.zero_()
    assert_same(on_meta, trace(real, image_size=CLASSIFIERS[name]))
    assert on_meta.facts["warnings"] == []
    assert on_meta.type_N.max() < 15  # a hypernetwork for vision has an embedding for every node
    covered = {node.name for node in on_meta.nodes}
    norms = {path for path, module in real.named_modules() if "Norm" in type(module).__name__}
    missing = {key for key, _ in real.named_parameters() if key not in covered and key.rpartition(".")[0] not in norms}
    assert all(key.endswith(("layer_scale", "bias_table", "logit_scale")) for key in missing)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_language_models_have_the_same_graph_however_they_are_built(family, tie):
    if family == "gpt2":
        architecture = gpt2(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16, tie_word_embeddings=tie)
    else:
        options = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50, "tie_word_embeddings": tie}
        architecture = llama(hidden_size=16, intermediate_size=24, **options)
    graph = trace(architecture.build_meta(attention="eager"))
    assert graph.variant == "llm"
    assert_same(graph, trace(architecture.build(attention="eager")))
    assert_same(graph, trace(architecture.build_meta(attention="sdpa")))  # the softmax is made visible
    fused = trace(architecture.build_meta(attention="sdpa"), attention="as_is")
    assert sum(node.type_name == "msa" for node in graph.nodes) == 2
    assert not any(node.type_name == "msa" for node in fused.nodes)


def test_depth_repeats_the_block():
    graphs = [trace(vit(4, depth, 2, 16).build_meta()) for depth in (1, 2, 5)]
    assert len(graphs[2]) - len(graphs[1]) == 3 * (len(graphs[1]) - len(graphs[0]))


def test_the_table_decides_what_a_multiplication_is():
    net = classifier("mobilenet_v3_small")
    of_vision, of_language = trace(net), trace(net, variant="llm")
    excites = of_vision.type_N == 6
    assert excites.sum() == 9
    assert (of_language.type_N[excites] == 17).all()
    assert (of_language.type_N[~excites] == of_vision.type_N[~excites]).all()


def test_graphs_do_not_depend_on_the_order_of_hashes():
    program = (
        "import json, torchvision; from logah.meta_building import build_on_meta; from logah.tracing import trace\n"
        "graphs = [trace(build_on_meta(getattr(torchvision.models, n))) for n in ('mobilenet_v3_small', 'swin_t')]\n"
        "print(json.dumps([[[n.name for n in g.nodes], g.distance_NN.tolist()] for g in graphs]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    for name, (names, distances) in zip(("mobilenet_v3_small", "swin_t"), json.loads(done.stdout), strict=True):
        graph = trace(classifier(name))
        assert [node.name for node in graph.nodes] == names
        assert graph.distance_NN.tolist() == distances


def test_a_cutoff_of_one_leaves_edges_only():
    net = SmallConvNet(8, 10)
    full, cut = (trace(net, image_size=16, ve_cutoff=cutoff) for cutoff in (50, 1))
    assert cut.distance_NN.max() == 1 and full.distance_NN.max() > 1
    np.testing.assert_array_equal(cut.distance_NN, full.distance_NN == 1)


def test_unreduced_graphs_show_every_operation():
    net = SmallConvNet(8, 10)
    graph = trace(net, image_size=16, reduce_graph=False, list_all_nodes=True)
    names = [node.name for node in graph.nodes]
    assert "ReluBackward0" in names and "bn1.bias" in names
    assert all(node.listed for node in graph.nodes)
    assert next(node for node in graph.nodes if node.name == "ReluBackward0").type_name == "sum"


def test_edges_stay_those_of_autograd_without_repairs():
    net = SmallConvNet(8, 10)
    assert ("fc.weight", "fc.bias") in edges(trace(net, image_size=16))
    as_walked = trace(net, image_size=16, fix_weight_edges=False)
    assert ("MeanBackward1", "fc.bias") in edges(as_walked)
    attention = vit(4, 1, 2, 16).build_meta()
    side = {("encoder.layers.encoder_layer_0.self_attention.in_proj_bias",
             "encoder.layers.encoder_layer_0.self_attention.out_proj.weight")}  # fmt: skip
    assert not side & edges(trace(attention))
    assert side <= edges(trace(attention, fix_softmax_edges=False))


def test_training_and_evaluation_mode_give_one_graph():
    net = classifier("efficientnet_b0")
    assert_same(trace(net.train()), trace(net.eval()))


class Head(nn.Module):
    """A linear layer and what is made of its scores."""

    def __init__(self, function) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(self.fc(x.mean((2, 3))))


@pytest.mark.parametrize("function", [lambda x: x.argmax(1), lambda x: x.detach()], ids=["integers", "detached"])
def test_an_output_without_gradient_is_refused(function):
    with pytest.raises(ConfigError, match="Head gives no output with a grad_fn"):
        trace(Head(function), image_size=8)


def test_an_output_nothing_leads_to_is_reported(caplog):
    graph = trace(Head(lambda x: (x, torch.ones(2))), image_size=8)
    assert "1 of its outputs" in graph.facts["warnings"][0]
    assert "graph of Head" in caplog.text


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_activation_checkpointing_of_transformers_does_not_hide_blocks(device):
    architecture = gpt2(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
    plain = trace(architecture.build_meta())
    net = architecture.build() if device == "cpu" else architecture.build_meta()
    net.gradient_checkpointing_enable()
    net.config.use_cache = False
    assert_same(trace(net.train()), plain)
    assert net.is_gradient_checkpointing and not net.config.use_cache


def test_recomputed_blocks_are_reported():
    net = SmallConvNet(8, 10)
    convolve = net.conv3.forward
    net.conv3.forward = lambda x: checkpoint(convolve, x, use_reentrant=True)
    warnings = trace(net, image_size=16).facts["warnings"]
    assert any("activation checkpointing" in warning for warning in warnings)


def test_attention_that_stays_fused_is_reported():
    net = vit(4, 1, 2, 16).build()
    fused = F.scaled_dot_product_attention
    net.encoder.layers[0].self_attention.forward = lambda x, *_, **__: (fused(x, x, x), None)
    assert any("stays fused" in warning for warning in trace(net).facts["warnings"])
    assert trace(net, attention="as_is").facts["warnings"] == []


@pytest.mark.parametrize(
    "options", [{"variant": "audio"}, {"attention": "flash"}, {"version": "v3"}, {"ve_cutoff": 0}], ids=str
)
def test_unknown_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        trace(Head(lambda x: x), **options)


def test_a_replaced_linear_function_changes_no_graph(monkeypatch):
    """As DeepSpeed's ZeRO-3 leaves one behind."""

    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            return torch._C._nn.linear(x, weight, bias)

        @staticmethod
        def backward(ctx, gradient):
            raise AssertionError("never run")

    network = gpt2(16, 1, 2, vocab_size=50, n_positions=16)
    expected = trace(network.build_meta())
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: Other.apply(x, weight, bias))
    assert_same(trace(network.build_meta()), expected)
