"""Which nodes the reduction keeps."""

import pytest
import torch
from torch import Tensor, nn

from logah.autograd_walk import parameter_owners, walk
from logah.graph_filters import NetFacts, drop_single_input_joins, net_facts, reduce_graph
from logah.operation_graph import OperationGraph, Record

CONVOLUTIONAL = NetFacts(gated=False, rms_norm=False, squeezes=False)
SQUEEZING = NetFacts(gated=False, rms_norm=False, squeezes=True)
LLAMA = NetFacts(gated=True, rms_norm=True, squeezes=False)


def chain(*names):
    """A graph whose nodes follow one another from the last to the first, as a walk lists them."""
    graph = OperationGraph()
    linear = nn.Linear(1, 1)
    for name in names:
        graph.add_node(Record(name, linear if name.endswith("weight") else None))
    for slot in range(1, len(names)):
        graph.add_edge(slot, slot - 1)
    return graph


@pytest.mark.parametrize(
    "facts, names, kept",
    [
        (CONVOLUTIONAL, ["fc.weight", "ViewBackward0", "MeanBackward1", "conv.weight"], True),
        (SQUEEZING, ["fc.weight", "ViewBackward0", "MeanBackward1", "conv.weight"], True),
        (SQUEEZING, ["a.weight", "b.weight", "c.weight", "MeanBackward1", "conv.weight"], False),
        (LLAMA, ["head.weight", "MeanBackward1", "conv.weight"], False),
    ],
)
def test_a_mean_stays_unless_it_squeezes(facts, names, kept):
    graph = chain(*names)
    reduce_graph(graph, facts, "vision")
    assert ("MeanBackward1" in graph.names()) == kept
    assert "ViewBackward0" not in graph.names()


@pytest.mark.parametrize(
    "facts, names, kept",
    [
        (SQUEEZING, ["a.weight", "b.weight", "MulBackward0", "HardsigmoidBackward0", "c.weight"], True),
        (SQUEEZING, ["a.weight", "b.weight", "MulBackward0", "DivBackward0", "c.weight"], False),
        (SQUEEZING, ["classifier.weight", "b.weight", "MulBackward0", "SigmoidBackward0", "c.weight"], False),
        (CONVOLUTIONAL, ["a.weight", "b.weight", "MulBackward0", "ReluBackward0", "c.weight"], False),
        (LLAMA, ["0.down_proj.weight", "ViewBackward0", "MulBackward0", "SiluBackward0", "c.weight"], True),
        (LLAMA, ["0.o_proj.weight", "ViewBackward0", "MulBackward0", "SiluBackward0", "c.weight"], False),
    ],
)
def test_a_multiplication_stays_where_it_excites_or_gates(facts, names, kept):
    graph = chain(*names)
    reduce_graph(graph, facts, "llm")
    assert ("MulBackward0" in graph.names()) == kept


def test_sums_with_one_input_are_bridged_in_the_second_filter():
    graph = chain("a.weight", "AddBackward0", "b.weight")
    drop_single_input_joins(graph, CONVOLUTIONAL)
    assert graph.names() == ["a.weight", "b.weight"]
    assert graph.successors[2] == {0}


def test_a_join_counts_the_inputs_it_had_before_the_first_filter():
    graph = chain("a.weight", "CatBackward0", "b.weight")
    graph.add_edge(graph.add_node(Record("ExpandBackward0")), 1)
    reduce_graph(graph, CONVOLUTIONAL, "vision")
    assert "CatBackward0" in graph.names()
    drop_single_input_joins(graph, CONVOLUTIONAL)
    assert "CatBackward0" not in graph.names()


def test_a_name_inside_another_removes_both():
    """Kept from the released graphs: names are searched, not compared."""
    graph = OperationGraph()
    graph.add_node(Record("scale", nn.PReLU()))
    graph.add_node(Record("scaled.weight", nn.Linear(1, 1)))
    graph.add_node(Record("fc.weight", nn.Linear(1, 1)))
    reduce_graph(graph, CONVOLUTIONAL, "vision")
    assert graph.names() == ["fc.weight"]


def test_facts_are_read_off_modules_and_operations():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.ModuleDict({"gate_proj": nn.Linear(2, 2)})
            self.norm = nn.RMSNorm(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.sigmoid(self.mlp["gate_proj"](x)))

    model = Gated()
    facts = net_facts(model, walk([model(torch.ones(1, 2))], parameter_owners(model)))
    assert facts == NetFacts(gated=True, rms_norm=True, squeezes=True)
    assert facts.llama
