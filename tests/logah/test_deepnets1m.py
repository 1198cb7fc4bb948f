"""The reader of DeepNets-1M, on a small set in its format, and the networks that it describes."""

import json
import pickle
import sys
import types

import numpy as np
import pytest
import torch

from common.errors import ConfigError, DataError
from logah.assignment import plan_targets
from logah.deepnets1m import DeepNets1M, parameter_name, primitive_of, with_shapes
from logah.deepnets1m_network import DeepNetwork, parse_operation, skip_unlisted
from logah.net_graph import NetGraph
from logah.tracing import trace

CELL = {
    "normal": [["sep_conv_3x3", 0], ["cse", 1], ["conv_7x1_1x7", 1], ["dil_conv_3x3", 2]],
    "normal_concat": [2, 3],
    "reduce": [["max_pool_3x3", 0], ["skip_connect", 1], ["none", 0], ["conv_1x1", 2]],
    "reduce_concat": [2, 3],
}
OPTIONS = {"norm": "bn", "ks": 3, "preproc": True, "glob_avg": True, "stem_pool": False, "C_mult": 2, "n_cells": 3,
           "fc_layers": 1, "C": 16, "fc_dim": 64, "stem_type": 0}  # fmt: skip


def traced() -> tuple[DeepNetwork, NetGraph]:
    torch.manual_seed(0)
    network = DeepNetwork(CELL, **OPTIONS)
    return network, trace(network, ve_cutoff=50)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The traced graph stored as the public files store graphs; h5py is played by a module that reads an npz file."""
    _, graph = traced()
    kinds = {number: name for number, name in enumerate(["conv_3x3", *sorted({n.type_name for n in graph.nodes})])}
    numbers = {name: number for number, name in kinds.items()}
    names, nodes = {}, []
    for node in graph.nodes:
        cell, name = 0, node.name
        if name.startswith("cells."):
            _, cell, name = name.split(".", 2)
        name = "" if node.name == "input" else name.replace(".op.", ".") if "_ops" in name else name
        names.setdefault(name, len(names))
        nodes.append([numbers[node.type_name], int(cell), names[name], 0, 0, 0, 0])
    np.savez(tmp_path / "stored.npz", adj=graph.distance_NN, nodes=np.array(nodes))
    described = {**OPTIONS, "genotype": CELL, "num_nodes": len(graph), "num_params": {"cifar10": 3e5, "imagenet": 3e5}}
    meta = {"primitives_ext": kinds, "unique_op_names": {number: name for name, number in names.items()}}
    for stem, split in (("train", "train"), ("eval", "wide")):
        (tmp_path / f"deepnets1m_{stem}.hdf5").write_bytes(b"not read by the stand-in")
        text = json.dumps({split: {"nets": [described], "meta": meta}})
        (tmp_path / f"deepnets1m_{stem}_meta.json").write_text(text)

    class File(dict):
        def __init__(self, path, mode):
            with np.load(tmp_path / "stored.npz") as arrays:
                stored = {name: array[None] for name, array in arrays.items()}
            single = {name: types.SimpleNamespace(__getitem__=None, array=array[0]) for name, array in stored.items()}
            graph = {name: _Dataset(one.array) for name, one in single.items()}
            super().__init__({split: {"0": graph} for split in ("train", "wide")})

        def close(self):
            self.clear()

    monkeypatch.setitem(sys.modules, "h5py", types.SimpleNamespace(File=File))
    return tmp_path


class _Dataset:
    def __init__(self, array):
        self.array = array

    def __getitem__(self, key):
        assert key == ()
        return self.array


def test_a_stored_graph_is_that_of_its_network(folder):
    network, graph = traced()
    nets = DeepNets1M(folder)
    assert len(nets) == 1 and nets.num_nodes == [len(graph)]
    read = with_shapes(nets[0].graph, {name: tuple(p.shape) for name, p in network.named_parameters()})
    assert (read.distance_NN == graph.distance_NN).all() and (read.type_N == graph.type_N).all()
    for mine, other in zip(graph.nodes, read.nodes, strict=True):
        if mine.listed and "." in mine.name:
            assert (mine.name, mine.shape, mine.is_last_weight) == (other.name, other.shape, other.is_last_weight)
    assert plan_targets(read, network).covered == plan_targets(graph, network).covered
    rebuilt = DeepNetwork(**nets[0].options)
    assert rebuilt.state_dict().keys() == network.state_dict().keys()


def test_virtual_edges_beyond_the_cutoff_are_dropped(folder):
    assert DeepNets1M(folder, ve_cutoff=3)[0].graph.distance_NN.max() == 3
    assert set(np.unique(DeepNets1M(folder, ve_cutoff=1)[0].graph.distance_NN)) == {0, 1}


def test_widths_follow_the_split_and_the_training_law(folder):
    assert DeepNets1M(folder, "wide")[0].options["C"] == 64
    nets = DeepNets1M(folder)
    drawn = [nets.draw_widths(nets[0], np.random.RandomState(seed)) for seed in range(60)]
    assert {one["C"] for one in drawn} == {32, 48, 64}  # 0.3 million parameters: the three narrowest
    assert {one["fc_dim"] for one in drawn} == {64, 128, 192, 256}
    nets.networks[0]["num_params"]["cifar10"] = 1e6
    assert {nets.draw_widths(nets[0], np.random.RandomState(seed))["C"] for seed in range(5)} == {32}


def test_workers_open_the_file_for_themselves(folder):
    nets = DeepNets1M(folder)
    nets[0]
    copy = pickle.loads(pickle.dumps(nets))
    assert copy._file is None and len(copy[0].graph) == len(nets[0].graph)
    nets.close()
    assert len(nets[0].graph) == len(copy[0].graph)


def test_what_is_missing_or_damaged_is_named(folder, monkeypatch):
    with pytest.raises(ConfigError, match="split='tiny'"):
        DeepNets1M(folder, "tiny")
    with pytest.raises(DataError, match="deepnets1m_search.hdf5 is missing"):
        DeepNets1M(folder, "search")
    with pytest.raises(DataError, match="holds no split 'deep'"):
        DeepNets1M(folder, "deep")
    nets = DeepNets1M(folder)
    with pytest.raises(IndexError, match="has 1 architectures"):
        nets[1]
    nets._names = {}
    with pytest.raises(DataError, match="node 0 refers to number 0"):
        nets[0]
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ConfigError, match="pip install h5py"):
        DeepNets1M(folder)[0]


def test_names_of_old_files_are_completed():
    assert parameter_name("_ops.3.1.weight", 2) == "cells.2._ops.3.op.1.weight"
    assert parameter_name("_ops.3.op.1.weight", 2) == "cells.2._ops.3.op.1.weight"
    assert parameter_name("_ops.0.to_out.0.", 1) == "cells.1._ops.0.to_out.0.weight"
    assert parameter_name("stem0.1.weight", 0) == "stem0.1.weight" and parameter_name("pos_enc", 0) == "pos_enc"
    assert [primitive_of(kind) for kind in ("conv_3x3", "sep_conv_5x5", "fc-b", "glob_avg", "max_pool_3x3")] == [
        "conv", "sep_conv", "bias", "glob_avg", "max_pool",
    ]  # fmt: skip
    assert parse_operation("conv_7x1_1x7") == ("conv", 7, True) and parse_operation("cse") == ("cse", 0, False)


def test_darts_network_has_its_published_size():
    darts = {
        "normal": [("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
                   ("sep_conv_3x3", 1), ("skip_connect", 0), ("skip_connect", 0), ("dil_conv_3x3", 2)],
        "normal_concat": [2, 3, 4, 5],
        "reduce": [("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 1),
                   ("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("max_pool_3x3", 1)],
        "reduce_concat": [2, 3, 4, 5],
    }  # fmt: skip
    with torch.device("meta"):
        network = DeepNetwork(darts, C=36, n_cells=20)
    assert sum(p.numel() for p in network.parameters()) == 3_349_342  # 3.3 million without the auxiliary head


@pytest.mark.parametrize(
    "options",
    [
        {"stem_type": 1, "fc_layers": 2, "fc_dim": 32, "glob_avg": False},
        {"stem_pool": True, "norm": "none"},
        {"genotype": {**CELL, "normal": [("none", 0), ("msa", 1)], "normal_concat": [2],
                      "reduce": [("none", 0), ("avg_pool_3x3", 1)], "reduce_concat": [2]},
         "preproc": False, "C_mult": 1},
    ],
)  # fmt: skip
def test_every_kind_of_network_runs_and_is_traced(options):
    network = DeepNetwork(**({"genotype": CELL} | OPTIONS | options)).eval()
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    with torch.device("meta"):
        meta = DeepNetwork(**({"genotype": CELL} | OPTIONS | options))
    assert trace(meta).nodes == trace(network).nodes


def test_operations_without_a_node_are_skipped_and_unknown_ones_refused():
    network, graph = traced()
    images = torch.randn(2, 3, 32, 32)
    names = {node.name for node in graph.nodes}
    before = network.eval()(images)
    skip_unlisted(network, names)
    assert torch.equal(network(images), before)
    skip_unlisted(network, {name for name in names if "cells.1._ops.0." not in name})
    assert network.cells[1].skipped == {0} or not list(network.cells[1]._ops[0].parameters())
    with pytest.raises(DataError, match="'wave_3x3'"):
        DeepNetwork({**CELL, "normal": [("wave_3x3", 0), ("none", 1)], "normal_concat": [2]}, **OPTIONS)
