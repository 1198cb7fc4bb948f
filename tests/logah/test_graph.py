"""``python -m logah.graph`` and what it is made of: properties, files, drawings."""

import json
import sys
from pathlib import Path

import networkx
import numpy as np
import pytest

from common.errors import ConfigError, DataError
from logah import graph
from logah.architecture_graphs import trace_architecture
from logah.architectures import vit
from logah.graph_drawing import draw_graph, place_nodes
from logah.graph_files import read_graph, write_graph
from logah.graph_properties import compute_properties
from logah.net_graph import NetGraph, Node

TINY = "vit_s_cifar?num_layers=1&hidden_dim=16&num_heads=2"


@pytest.fixture(scope="module")
def traced() -> NetGraph:
    return trace_architecture(vit(patch_size=8, num_layers=2, num_heads=2, hidden_dim=16), ve_cutoff=7)


def test_properties_agree_with_networkx(traced):
    found = compute_properties(traced)
    other = networkx.from_numpy_array(traced.distance_NN == 1, create_using=networkx.DiGraph)
    lengths = [length for _, to in networkx.shortest_path_length(other) for length in to.values() if length]
    assert found.edges == other.number_of_edges() and found.nodes == len(traced)
    assert found.mean_degree == pytest.approx(np.mean([degree for _, degree in other.degree]))
    assert (found.mean_path, found.longest_path) == (pytest.approx(np.mean(lengths)), max(lengths))
    assert found.depth == networkx.dag_longest_path_length(other)
    assert sum(found.types.values()) == found.nodes


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_a_written_graph_reads_back_equal(traced, tmp_path, suffix):
    path = write_graph(traced, tmp_path / f"graph{suffix}")
    again = read_graph(path)
    assert again.nodes == traced.nodes and (again.distance_NN == traced.distance_NN).all()
    assert (again.ve_cutoff, again.variant, again.attention, again.facts) == (7, "vision", "explicit", traced.facts)
    with pytest.raises(ConfigError, match="overwrite=true"):
        write_graph(traced, path)


def test_damaged_graph_files_are_refused_by_name(traced, tmp_path):
    path = write_graph(traced, tmp_path / "graph.json")
    content = json.loads(path.read_text())
    for change, words in (
        ({"edges": [[0, 999]]}, "edge 0 goes from node 0 to node 999"),
        ({"nodes": [{"name": "a", "type": "wavelet"}]}, r"node 0 \(a\) has the type 'wavelet'"),
        ({"format": "other"}, "is not a graph"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(DataError, match=words):
            read_graph(path)
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read as a graph"):
        read_graph(path)


@pytest.mark.parametrize(("suffix", "start"), [(".pdf", b"%PDF"), (".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_drawings_of_every_format_are_the_same_each_time(traced, tmp_path, suffix, start):
    first = draw_graph(traced, tmp_path / f"a{suffix}").read_bytes()
    assert first.startswith(start)
    if suffix != ".svg":  # matplotlib numbers the parts of SVG files at random
        assert draw_graph(traced, tmp_path / f"b{suffix}", labels=True).read_bytes() == first


def test_no_two_nodes_share_a_place_and_edges_go_downwards(traced):
    place_N2 = place_nodes(traced)
    assert len({tuple(place) for place in place_N2}) == len(traced)
    for start, end in np.argwhere(traced.distance_NN == 1):
        assert place_N2[start, 1] < place_N2[end, 1]


def test_a_graph_without_edges_has_properties_and_a_drawing(tmp_path):
    lonely = NetGraph((Node("input", 9),), np.zeros((1, 1), dtype=np.int16), 1)
    assert compute_properties(lonely).mean_path == 0
    draw_graph(lonely, tmp_path / "lonely.png")


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["logah.graph", *arguments])
    return graph.main()


def test_the_command_traces_writes_draws_and_reads_its_own_file(monkeypatch, tmp_path, capsys):
    output, drawing = tmp_path / "vit.json", tmp_path / "vit.png"
    assert run(monkeypatch, f"model={TINY}", f"output={output}", f"drawing={drawing}", "show_nodes=true") == 0
    printed = capsys.readouterr().out
    assert "encoder.pos_embedding" in printed and "class head" in printed and str(output) in printed
    assert drawing.is_file() and len(read_graph(output)) == len(json.loads(output.read_text())["nodes"])
    assert run(monkeypatch, str(output)) == 0
    assert run(monkeypatch, TINY, "graph_version=v2") == 0
    assert "concat" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resnet999"], "resnet999"),
        ([TINY, "drawing=graph.gif"], "drawing=graph.gif must end in"),
        ([TINY, "graph_version=v3"], "graph_version"),
        ([TINY, "ve_cutoff=0"], "ve_cutoff"),
        ([TINY, "graph_version=v2", "reduce_graph=false"], "reduce_graph=false"),
    ],
)
def test_wrong_options_end_with_code_2_and_their_name(monkeypatch, capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_existing_files_are_refused_before_tracing(monkeypatch, tmp_path, capsys):
    path = Path(tmp_path, "graph.json")
    path.write_text("mine")
    with pytest.raises(SystemExit):
        run(monkeypatch, TINY, f"output={path}")
    assert "overwrite=true" in capsys.readouterr().err and path.read_text() == "mine"
