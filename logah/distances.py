"""Lengths of shortest directed paths, the edge features of a graph.

Dimensions: N nodes.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

UNREACHED = np.int16(np.iinfo(np.int16).max // 2)


def shortest_paths(successors: Sequence[Sequence[int]], *, ve_cutoff: int) -> NDArray[np.int16]:
    """distance_NN: length of the shortest path i -> j where it is at most ``ve_cutoff``, else 0.

    Source: virtual edges of GHN-2 (Knyazev et al., 2021), which GHN-3 and LoGAH read as distances.
    """
    size = len(successors)
    forward = all(target > node for node, targets in enumerate(successors) for target in targets)
    distance_NN = _of_sorted(successors, size) if forward else _of_any(successors, size)
    distance_NN[distance_NN > max(ve_cutoff, 1)] = 0
    np.fill_diagonal(distance_NN, 0)
    return distance_NN


def _of_sorted(successors: Sequence[Sequence[int]], size: int) -> NDArray[np.int16]:
    """One row operation per edge: a path from i continues with the best of its successors, which are done before."""
    distance_NN = np.full((size, size), UNREACHED, dtype=np.int16)
    for node in range(size - 1, -1, -1):
        row_N = distance_NN[node]
        for target in successors[node]:
            np.minimum(row_N, distance_NN[target] + np.int16(1), out=row_N)
        row_N[node] = 0
    return distance_NN


def _of_any(successors: Sequence[Sequence[int]], size: int) -> NDArray[np.int16]:
    """Breadth-first from every node: for the rare graph with a cycle."""
    distance_NN = np.full((size, size), UNREACHED, dtype=np.int16)
    for source in range(size):
        row_N = distance_NN[source]
        row_N[source] = 0
        reached = [source]
        for node in reached:  # grows while it is read
            for target in successors[node]:
                if row_N[target] == UNREACHED:
                    row_N[target] = row_N[node] + 1
                    reached.append(target)
    return distance_NN
