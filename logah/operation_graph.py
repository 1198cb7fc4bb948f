"""A graph of parameters and operations that can be edited: what the tracer works on before it becomes a ``NetGraph``.

Nodes are numbered by *slots* that never change; ``order`` lists the slots still present. Edges belong to slots, names
and modules to *records*, so that two nodes can trade records while the edges stay.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(slots=True)
class Record:
    """What stands in a slot.

    Attributes:
        name: ``module.path.weight`` of a parameter, class name of the backward function of an operation.
        module: owner of the parameter; None for an operation.
        size: of the parameter.
        kernel: window of a pool, where the operation tells it.
    """

    name: str
    module: nn.Module | None = None
    size: tuple[int, ...] | None = None
    kernel: tuple[int, ...] | None = None


class OperationGraph:
    """Directed graph without parallel edges; removal costs predecessors x successors of the removed node."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.order: list[int] = []
        self.successors: list[set[int]] = []
        self.predecessors: list[set[int]] = []

    def __len__(self) -> int:
        return len(self.order)

    def name(self, slot: int) -> str:
        return self.records[slot].name

    def names(self) -> list[str]:
        """Names in list order."""
        return [self.records[slot].name for slot in self.order]

    def add_node(self, record: Record, *, position: int | None = None) -> int:
        """The slot of a new node, at the end of the list or at ``position``."""
        slot = len(self.records)
        self.records.append(record)
        self.successors.append(set())
        self.predecessors.append(set())
        self.order.insert(len(self.order) if position is None else position, slot)
        return slot

    def add_edge(self, source: int, target: int) -> None:
        self.successors[source].add(target)
        self.predecessors[target].add(source)

    def remove_edge(self, source: int, target: int) -> None:
        self.successors[source].discard(target)
        self.predecessors[target].discard(source)

    def swap_records(self, first: int, second: int) -> None:
        self.records[first], self.records[second] = self.records[second], self.records[first]

    def move_successors(self, source: int, target: int) -> None:
        """Edges ``source`` -> x become ``target`` -> x, except to ``target`` itself."""
        for node in list(self.successors[source]):
            if node != target:
                self.remove_edge(source, node)
                self.add_edge(target, node)

    def contract(self, slots: Iterable[int]) -> None:
        """Removes nodes; each one's predecessors are joined with each of its different successors."""
        gone = set(slots)
        if not gone:
            return
        for slot in gone:
            before = self.predecessors[slot] - {slot}
            after = self.successors[slot] - {slot}
            for source in before:
                successors = self.successors[source]
                successors.discard(slot)
                successors |= after - {source}
            for target in after:
                predecessors = self.predecessors[target]
                predecessors.discard(slot)
                predecessors |= before - {target}
            self.predecessors[slot] = set()
            self.successors[slot] = set()
        self.order = [slot for slot in self.order if slot not in gone]

    def topological_order(self) -> list[int] | None:
        """Slots so that every edge points forwards, or None with a cycle.

        Sources first in list order; then each node as soon as its last predecessor has been listed, the successors of
        a node in list order. (Kahn's algorithm with a queue, the order that networkx gives.)
        """
        rank = {slot: position for position, slot in enumerate(self.order)}
        waiting = {slot: len(self.predecessors[slot] - {slot}) for slot in self.order}
        listed = [slot for slot in self.order if not waiting[slot]]
        for slot in listed:  # grows while it is read
            for target in sorted(self.successors[slot] - {slot}, key=rank.__getitem__):
                waiting[target] -= 1
                if not waiting[target]:
                    listed.append(target)
        return listed if len(listed) == len(self.order) else None
