"""Which nodes of a traced network stay: operations that no primitive stands for are bridged.

Source: GHN-3 (Knyazev et al., 2023) and PPUDA, simplification of automatic graphs, with the rules LoGAH (arXiv
2405.16287) added for language models. The rules look at neighbours *in the list*, so the order of the modules of a
network matters; they are kept as they are because released hypernetworks were trained on the graphs they give.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from logah.node_types import is_rms_norm, is_supported
from logah.operation_graph import OperationGraph

RULED = ("Mean", "Mul", "Cat", "Add")
HEAD = ("classifier", "fc", "head")


@dataclass(frozen=True)
class NetFacts:
    """What the rules ask about the network.

    Attributes:
        gated: it has gated perceptrons (``mlp.gate_proj``), as Llama has.
        rms_norm: it has root-mean-square norms.
        squeezes: its walk met a sigmoid or swish, the mark of squeeze-excite networks.
    """

    gated: bool
    rms_norm: bool
    squeezes: bool

    @property
    def llama(self) -> bool:
        """Llama and its relatives (Mistral, Qwen, StableLM, ...): layers without biases, mended in another order."""
        return self.gated


def net_facts(model: nn.Module, graph: OperationGraph) -> NetFacts:
    names = {record.name.lower() for record in graph.records if record.module is None}
    return NetFacts(
        gated=any(path.endswith("mlp.gate_proj") for path, _ in model.named_modules()),
        rms_norm=any(is_rms_norm(module) for module in model.modules()),
        squeezes=any("sigmoid" in name or "swish" in name for name in names),
    )


def reduce_graph(graph: OperationGraph, facts: NetFacts, variant: str) -> None:
    """Removes, in place, what hypernetworks do not read."""
    unsupported = {graph.name(slot) for slot in graph.order if not is_supported(graph.records[slot], variant)}
    plain = [name for name in unsupported if not name.startswith(RULED)]
    ruled = sorted(unsupported.difference(plain))
    incoming = _incoming(graph)
    _filter(graph, "Mul", facts, incoming)
    graph.contract(_containing(graph, plain))
    for name in (*ruled, "Mean", "Add", "Cat"):
        _filter(graph, name, facts, incoming)


def drop_single_input_joins(graph: OperationGraph, facts: NetFacts) -> None:
    """Removes, in place, sums and concats that the repairs or the first reduction left with one input."""
    incoming = _incoming(graph)
    for name in ("Add", "Cat"):
        _filter(graph, name, facts, incoming)


def _incoming(graph: OperationGraph) -> dict[int, int]:
    return {slot: len(graph.predecessors[slot]) for slot in graph.order}


def _containing(graph: OperationGraph, names: Sequence[str]) -> list[int]:
    """Nodes whose name contains one of ``names``."""
    wanted = set(names)
    text = "\n".join(sorted({graph.name(slot) for slot in graph.order} - wanted))
    inner = [name for name in names if name in text]  # part of the name of another node too: rare
    return [
        slot
        for slot in graph.order
        if (name := graph.name(slot)) in wanted or (inner and any(part in name for part in inner))
    ]


def _filter(graph: OperationGraph, part: str, facts: NetFacts, incoming: dict[int, int]) -> None:
    """Removes the nodes whose name contains ``part``, except those a rule keeps."""
    names = graph.names()
    graph.contract(
        [
            slot
            for position, slot in enumerate(graph.order)
            if part in names[position] and not _keep(names, position, facts, incoming[slot])
        ]
    )


def _keep(names: list[str], position: int, facts: NetFacts, incoming: int) -> bool:
    """The rule for the node at ``position``, which had ``incoming`` edges before the filters began."""

    def neighbour(offset: int) -> str:
        """Negative positions count from the end of the list, as the rules always had it."""
        return names[position + offset] if -len(names) <= position + offset < len(names) else ""

    def starts(offset: int, prefixes: tuple[str, ...]) -> bool:
        return neighbour(offset).lower().startswith(prefixes)

    name = names[position]
    at_head = len(names) < 3 or neighbour(-1).startswith(HEAD) or neighbour(-2).startswith(HEAD)
    if name.startswith("Mean"):
        return not facts.rms_norm and (not facts.squeezes or at_head)
    if name.startswith("Mul"):
        if facts.gated:
            return starts(1, ("silu",)) and neighbour(-2).endswith("down_proj.weight")
        if not facts.squeezes or at_head:
            return False
        return starts(-2, ("hard", "sigmoid")) or starts(-3, ("relu", "mean")) or starts(1, ("hard", "sigmoid", "relu"))
    if name.startswith(("Cat", "Add")):
        if facts.gated:
            beside = any(starts(offset, ("neg", "softmax")) for offset in (-1, -2, 1))
            return name.startswith("Add") and incoming > 1 and not beside
        return incoming > 1
    return False
