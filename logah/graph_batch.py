"""Graphs of different sizes as one padded batch.

Dimensions: B graphs, N nodes of the largest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logah.net_graph import NetGraph


@dataclass(frozen=True)
class GraphBatch:
    """Padded with type 0, distance 0 and no shape; whatever the padding holds never reaches a valid node.

    Attributes:
        type_BN: int64.
        distance_BNN: int64; see ``NetGraph.distance_NN``.
        mask_BN: bool, True at nodes.
        shapes: of every node of every graph, None without.
    """

    type_BN: Tensor
    distance_BNN: Tensor
    mask_BN: Tensor
    shapes: tuple[tuple[tuple[int, ...] | None, ...], ...]

    def to(self, device: torch.device | str) -> "GraphBatch":
        return GraphBatch(self.type_BN.to(device), self.distance_BNN.to(device), self.mask_BN.to(device), self.shapes)


def collate(graphs: Sequence[NetGraph]) -> GraphBatch:
    """One batch of ``graphs``."""
    size = max(len(graph) for graph in graphs)
    type_BN = torch.zeros(len(graphs), size, dtype=torch.int64)
    distance_BNN = torch.zeros(len(graphs), size, size, dtype=torch.int64)
    mask_BN = torch.zeros(len(graphs), size, dtype=torch.bool)
    for row, graph in enumerate(graphs):
        count = len(graph)
        type_BN[row, :count] = torch.from_numpy(graph.type_N)
        distance_BNN[row, :count, :count] = torch.from_numpy(graph.distance_NN).long()
        mask_BN[row, :count] = True
    shapes = tuple(tuple(node.shape if node.listed else None for node in graph.nodes) for graph in graphs)
    return GraphBatch(type_BN, distance_BNN, mask_BN, shapes)
