"""Repairs of the edges of automatic graphs."""

from torch import nn

from logah.graph_repairs import (
    chain_weights,
    mend_llama_residual,
    mend_squeezenet_pooling,
    mend_swin_merging,
    route_llama_softmax,
    route_through_softmax,
)
from logah.operation_graph import OperationGraph, Record


def graph_of(records, edges):
    """Nodes by name; a name with a dot belongs to a module that it shares with the same path."""
    graph, modules, slots = OperationGraph(), {}, {}
    for name in records:
        path = name.rpartition(".")[0]
        module = modules.setdefault(path, nn.Linear(1, 1)) if path else None
        slots[name] = graph.add_node(Record(name, module))
    for source, target in edges:
        graph.add_edge(slots[source], slots[target])
    return graph


def edges(graph):
    return {(graph.name(s), graph.name(t)) for s in graph.order for t in graph.successors[s]}


def test_weight_and_bias_become_a_chain():
    graph = graph_of(
        ["next", "fc.bias", "x", "fc.weight"], [("x", "fc.bias"), ("fc.weight", "fc.bias"), ("fc.bias", "next")]
    )
    chain_weights(graph, llama=False)
    assert edges(graph) == {("x", "fc.weight"), ("fc.weight", "fc.bias"), ("fc.bias", "next")}


def test_weight_and_bias_of_one_function_become_a_chain():
    """addmm of transformers' Conv1D: both are its leaves and what follows reads the weight."""
    graph = graph_of(
        ["next", "c.bias", "c.weight", "x"], [("x", "c.bias"), ("c.weight", "c.bias"), ("c.weight", "next")]
    )
    chain_weights(graph, llama=False)
    assert edges(graph) == {("x", "c.weight"), ("c.weight", "c.bias"), ("c.bias", "next")}


def test_the_first_layer_has_nothing_to_be_chained_to():
    graph = graph_of(["fc.bias", "fc.weight"], [("fc.weight", "fc.bias")])
    chain_weights(graph, llama=False)
    assert edges(graph) == {("fc.weight", "fc.bias")}


def test_only_llama_chains_weights_to_other_modules():
    parts = (
        ["next", "MmBackward0", "x", "fc.weight"],
        [("x", "MmBackward0"), ("fc.weight", "MmBackward0"), ("MmBackward0", "next")],
    )
    untouched, mended = graph_of(*parts), graph_of(*parts)
    chain_weights(untouched, llama=False)
    chain_weights(mended, llama=True)
    assert edges(untouched) == set(parts[1])
    assert edges(mended) == {("x", "fc.weight"), ("fc.weight", "MmBackward0"), ("MmBackward0", "next")}


def test_values_from_the_same_projection_do_not_bypass_the_softmax():
    graph = graph_of(
        ["out.weight", "SoftmaxBackward0", "qkv.bias"],
        [("qkv.bias", "SoftmaxBackward0"), ("SoftmaxBackward0", "out.weight"), ("qkv.bias", "out.weight")],
    )
    route_through_softmax(graph)
    assert edges(graph) == {("qkv.bias", "SoftmaxBackward0"), ("SoftmaxBackward0", "out.weight")}


def test_values_from_their_own_projection_enter_the_softmax():
    graph = graph_of(
        ["out.weight", "SoftmaxBackward0", "q.bias", "v.bias"],
        [("q.bias", "SoftmaxBackward0"), ("SoftmaxBackward0", "out.weight"), ("v.bias", "out.weight")],
    )
    route_through_softmax(graph)
    expected = {("q.bias", "SoftmaxBackward0"), ("v.bias", "SoftmaxBackward0"), ("SoftmaxBackward0", "out.weight")}
    assert edges(graph) == expected


def test_llama_projections_enter_the_softmax_rotated():
    graph = graph_of(
        ["o.weight", "SoftmaxBackward0", "NegBackward0", "q.weight", "v.weight"],
        [
            ("q.weight", "NegBackward0"), ("NegBackward0", "SoftmaxBackward0"), ("q.weight", "SoftmaxBackward0"),
            ("SoftmaxBackward0", "o.weight"), ("v.weight", "o.weight"),
        ],
    )  # fmt: skip
    route_llama_softmax(graph)
    assert edges(graph) == {
        ("q.weight", "NegBackward0"), ("NegBackward0", "SoftmaxBackward0"), ("SoftmaxBackward0", "o.weight"),
        ("v.weight", "SoftmaxBackward0"),
    }  # fmt: skip


def test_the_first_residual_sum_of_llama_comes_back():
    graph = graph_of(
        ["embed_tokens.weight", "0.o_proj.weight", "0.input_layernorm.weight", "0.mlp.weight"],
        [
            ("0.o_proj.weight", "embed_tokens.weight"), ("embed_tokens.weight", "0.input_layernorm.weight"),
            ("embed_tokens.weight", "0.mlp.weight"),
        ],
    )  # fmt: skip
    mend_llama_residual(graph)
    assert edges(graph) == {
        ("0.o_proj.weight", "AddBackward0"), ("embed_tokens.weight", "AddBackward0"),
        ("embed_tokens.weight", "0.input_layernorm.weight"), ("AddBackward0", "0.mlp.weight"),
    }  # fmt: skip


def test_patch_merging_of_both_swins_is_a_chain():
    names = ["next", "m.norm.weight", "m.reduction.weight", "x"]
    read = {("x", "m.norm.weight"), ("m.norm.weight", "next")}
    first = graph_of(names, read | {("m.reduction.weight", "next")})
    mend_swin_merging(first)
    assert edges(first) == {
        ("x", "m.norm.weight"), ("m.norm.weight", "m.reduction.weight"), ("m.reduction.weight", "next"),
    }  # fmt: skip
    second = graph_of(names, read | {("m.reduction.weight", "m.norm.weight")})
    mend_swin_merging(second)
    assert edges(second) == {
        ("x", "m.reduction.weight"), ("m.reduction.weight", "m.norm.weight"), ("m.norm.weight", "next"),
    }  # fmt: skip


def test_squeezenet_averages_before_its_classifier():
    graph = graph_of(
        ["MeanBackward1", "classifier.1.bias", "classifier.1.weight", "CatBackward0"],
        [("CatBackward0", "classifier.1.weight"), ("classifier.1.weight", "classifier.1.bias"),
         ("classifier.1.bias", "MeanBackward1")],
    )  # fmt: skip
    mend_squeezenet_pooling(graph)
    assert edges(graph) == {
        ("CatBackward0", "MeanBackward1"), ("MeanBackward1", "classifier.1.weight"),
        ("classifier.1.weight", "classifier.1.bias"),
    }  # fmt: skip
