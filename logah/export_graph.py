"""From the drafted nodes of an exported program to a graph: what reaches the output, in topological order.

Dimensions: N nodes.
"""

import heapq
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import nn

from logah.distances import shortest_paths
from logah.net_graph import NetGraph, Node
from logah.primitives import NUMBER

logger = logging.getLogger(__name__)

INPUT = 0  # number of the input's draft


@dataclass
class Draft:
    """A node before its place in the order is known; ``predecessors`` are numbers of drafts."""

    name: str
    type: int
    shape: tuple[int, ...] | None = None
    listed: bool = False
    predecessors: list[int] = field(default_factory=list)
    is_parameter: bool = False


def assemble(
    drafts: Sequence[Draft],
    outputs: Sequence[int],
    *,
    model: nn.Module,
    ve_cutoff: int,
    variant: str,
    attention: str,
) -> NetGraph:
    """The graph of everything that ``outputs`` depend on.

    Weights that nothing precedes (tables of learned embeddings) follow the input.
    """
    for draft in drafts[1:]:
        if draft.is_parameter and not draft.predecessors and draft.name.endswith("weight"):
            draft.predecessors.append(INPUT)
    kept = ancestors(drafts, outputs) | {INPUT}
    order = topological_order(drafts, kept)
    place = {number: index for index, number in enumerate(order)}
    edges_NN = np.zeros((len(order), len(order)), dtype=bool)
    for number in order:
        for predecessor in drafts[number].predecessors:
            edges_NN[place[predecessor], place[number]] = True
    nodes = _mark_head([drafts[number] for number in order], edges_NN, variant)
    return NetGraph(
        nodes=tuple(nodes),
        distance_NN=shortest_paths([np.flatnonzero(row).tolist() for row in edges_NN], ve_cutoff=ve_cutoff),
        ve_cutoff=ve_cutoff,
        variant=variant,
        version="v2",
        attention=attention,
        facts={"class": type(model).__name__, "warnings": []},
    )


def ancestors(drafts: Sequence[Draft], outputs: Sequence[int]) -> set[int]:
    """Drafts with a path to ``outputs``, and these."""
    found, open_numbers = set(outputs), list(outputs)
    while open_numbers:
        fresh = [one for one in drafts[open_numbers.pop()].predecessors if one not in found]
        found.update(fresh)
        open_numbers += fresh
    return found


def topological_order(drafts: Sequence[Draft], kept: set[int]) -> list[int]:
    """``kept`` with predecessors first, otherwise in the order of their drafting."""
    missing = {number: len(set(drafts[number].predecessors)) for number in kept}
    successors: dict[int, list[int]] = {number: [] for number in kept}
    for number in kept:
        for predecessor in set(drafts[number].predecessors):
            successors[predecessor].append(number)
    ready = [number for number, count in missing.items() if count == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        number = heapq.heappop(ready)
        order.append(number)
        for successor in successors[number]:
            missing[successor] -= 1
            if missing[successor] == 0:
                heapq.heappush(ready, successor)
    assert len(order) == len(kept), "an exported program cannot have a cycle"
    return order


def _mark_head(drafts: list[Draft], edges_NN: NDArray[np.bool_], variant: str) -> list[Node]:
    """Nodes, with the classifier's marked: the last weight before the output, and the bias that follows it.

    A language model has none: its output embedding is decoded as any other matrix.
    """
    last_weight = last_bias = None
    if variant == "vision":
        parameters = [index for index, draft in enumerate(drafts) if draft.is_parameter]
        last = parameters[-1] if parameters else None
        if last is not None and drafts[last].type == NUMBER["bias"]:
            last_bias, before = last, np.flatnonzero(edges_NN[:, last])
            last = int(before[0]) if len(before) == 1 else None
        is_matrix = last is not None and drafts[last].is_parameter and len(drafts[last].shape or ()) >= 2
        last_weight = last if is_matrix else None
        last_bias = last_bias if is_matrix else None
    nodes = []
    for index, draft in enumerate(drafts):
        shape = draft.shape
        if index == last_weight and len(shape) == 4 and shape[2:] == (1, 1):
            shape = shape[:2]  # a 1x1 convolution classifies as a linear layer does
        nodes.append(Node(draft.name, draft.type, shape, draft.listed, index == last_weight, index == last_bias))
    return nodes
