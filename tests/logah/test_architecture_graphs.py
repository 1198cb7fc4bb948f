"""Graphs of descriptions: traced once per depth, and the same as if each had been traced."""

import numpy as np
import pytest

from logah.architecture_graphs import clear_graphs, count_nodes, trace_architecture
from logah.architectures import gpt2, llama, resolve_target, vit
from logah.tracing import trace


@pytest.fixture(autouse=True)
def _fresh_caches():
    clear_graphs()
    yield
    clear_graphs()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (vit(2, 2, 2, 16, image_size=8), vit(2, 2, 4, 32, 48, num_classes=100, image_size=8)),
        (gpt2(16, 2, 2, vocab_size=50, n_positions=16), gpt2(24, 2, 4, vocab_size=90, n_positions=32)),
        (
            gpt2(16, 2, 2, vocab_size=50, n_positions=16, tie_word_embeddings=True),
            gpt2(24, 2, 4, vocab_size=90, n_positions=32, tie_word_embeddings=True),
        ),
        (llama(16, 2, 2, vocab_size=50), llama(24, 2, 4, vocab_size=90)),
        (llama(16, 2, 2, 1, vocab_size=50), llama(32, 2, 4, 2, 72, vocab_size=90)),
    ],
    ids=["vit", "gpt2", "gpt2 tied", "llama", "llama with shared keys"],
)
@pytest.mark.parametrize("attention", ["explicit", "as_is"])
def test_a_graph_made_from_another_of_its_depth_equals_the_traced_one(first, second, attention):
    trace_architecture(first, attention=attention)
    derived = trace_architecture(second, attention=attention)
    implementation = "eager" if attention == "explicit" else "sdpa"
    traced = trace(second.build_meta(attention=implementation), attention=attention, image_size=second.image_size)
    assert derived.nodes == traced.nodes
    assert np.array_equal(derived.distance_NN, traced.distance_NN)
    shapes = {node.name: node.shape for node in trace_architecture(first, attention=attention).nodes}
    assert any(shapes[node.name] != node.shape for node in derived.nodes)


def test_networks_whose_graphs_differ_do_not_share_one():
    alone, shared = llama(16, 2, 2, 2, vocab_size=50), llama(16, 2, 2, 1, vocab_size=50)
    assert len(trace_architecture(vit(4, 2, 2, 16))) < len(trace_architecture(vit(4, 3, 2, 16)))
    assert len(trace_architecture(gpt2(16, 2, 2, vocab_size=50))) > len(
        trace_architecture(gpt2(16, 2, 2, vocab_size=50, tie_word_embeddings=True))
    )
    assert len(trace_architecture(alone)) == len(trace_architecture(shared))
    assert trace_architecture(alone) is not trace_architecture(shared)


def test_equal_calls_return_one_graph_and_other_options_another():
    network = vit(4, 2, 2, 16)
    graph = trace_architecture(network)
    assert trace_architecture(vit(4, 2, 2, 16)) is graph
    assert trace_architecture(network, attention="as_is") is not graph
    assert (trace_architecture(network, ve_cutoff=1).distance_NN <= 1).all()
    assert count_nodes(vit(4, 2, 4, 48)) == len(graph)


def test_only_shapes_of_a_given_network_are_read():
    trace_architecture(vit(4, 2, 2, 16))
    wide = vit(4, 2, 2, 32)
    graph = trace_architecture(wide, wide.build())
    assert {node.name: node.shape for node in graph.nodes}["conv_proj.weight"] == (32, 3, 4, 4)


def test_a_network_is_traced_at_its_own_size():
    small = resolve_target("resnet18?image_size=64")
    assert len(trace_architecture(small)) == len(trace_architecture(resolve_target("resnet18")))
