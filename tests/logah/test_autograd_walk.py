"""From autograd graphs to editable graphs."""

import torch
from torch import nn

from logah.autograd_walk import parameter_owners, walk


def edges(graph):
    return {(graph.name(s), graph.name(t)) for s in graph.order for t in graph.successors[s]}


def test_bias_follows_the_input_and_the_weight_hangs_beside_it():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = walk([model(torch.randn(2, 3))], parameter_owners(model))
    assert graph.names() == ["2.bias", "ReluBackward0", "0.bias", "0.weight", "2.weight"]
    assert {("ReluBackward0", "2.bias"), ("0.bias", "ReluBackward0"), ("2.weight", "2.bias")} <= edges(graph)


def test_a_convolution_is_its_weight_followed_by_its_bias():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    graph = walk([model(torch.randn(2, 3, 5, 5))], parameter_owners(model))
    assert edges(graph) == {("0.weight", "0.bias"), ("0.bias", "1.weight"), ("1.weight", "1.bias")}


def test_a_tied_parameter_is_one_node_of_its_last_owner():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    output = model["head"](model["embed"](torch.tensor([[1, 2]])).tanh())
    names = walk([output], parameter_owners(model)).names()
    assert names.count("head.weight") == 1
    assert not any("embed" in name for name in names)


def test_depth_is_not_limited_by_the_interpreter():
    model = nn.Linear(2, 2)
    x = model(torch.randn(1, 2))
    for _ in range(5000):
        x = x.tanh()
    graph = walk([x], parameter_owners(model))
    assert graph.names().count("TanhBackward0") == 5000


def test_an_input_that_requires_gradients_is_no_node():
    model = nn.Linear(2, 2)
    names = walk([model(torch.randn(1, 2, requires_grad=True) * 2)], parameter_owners(model)).names()
    assert names == ["bias", "MulBackward0", "weight"]


def test_pools_tell_their_window():
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.MaxPool2d(2), nn.AvgPool2d(3))
    graph = walk([model(torch.randn(1, 1, 12, 12))], parameter_owners(model))
    windows = {record.name: record.kernel for record in graph.records if record.module is None}
    assert windows == {"AvgPool2DBackward0": (3, 3), "MaxPool2DWithIndicesBackward0": (2, 2)}
