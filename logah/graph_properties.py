"""Numbers that describe a graph, and the order in which it is drawn.

Dimensions: N nodes.
"""

from collections import Counter
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from logah.distances import UNREACHED, shortest_paths
from logah.net_graph import NetGraph

UNLIMITED = int(UNREACHED) - 1


@dataclass(frozen=True)
class GraphProperties:
    """Of one graph; virtual edges do not count as edges.

    Attributes:
        mean_degree, max_degree: edges at a node, incoming and outgoing.
        mean_path: edges of the shortest directed path, over all ordered pairs with one.
        longest_path: the largest of these, the eccentricity of the graph.
        depth: edges of the longest directed path of all.
        sources, sinks: nodes that nothing precedes or follows.
        parameters: values of the parameters that are listed nodes (norms have a bias beside it).
    """

    nodes: int
    edges: int
    mean_degree: float
    max_degree: int
    mean_path: float
    longest_path: int
    depth: int
    sources: int
    sinks: int
    listed: int
    parameters: int
    types: dict[str, int]


def compute_properties(graph: NetGraph) -> GraphProperties:
    """The properties of ``graph``, from its edges alone.

    Source: average degree and average path length, by which GHN-2 (Knyazev et al., 2021) compares architectures.
    """
    edges_NN = graph.distance_NN == 1
    degree_N = edges_NN.sum(0) + edges_NN.sum(1)
    distance_NN = shortest_paths([np.flatnonzero(row).tolist() for row in edges_NN], ve_cutoff=UNLIMITED)
    reached = distance_NN[distance_NN > 0]
    return GraphProperties(
        nodes=len(graph),
        edges=int(edges_NN.sum()),
        mean_degree=float(degree_N.mean()),
        max_degree=int(degree_N.max()),
        mean_path=float(reached.mean()) if reached.size else 0.0,
        longest_path=int(reached.max(initial=0)),
        depth=int(layers(edges_NN).max(initial=0)),
        sources=int((edges_NN.sum(0) == 0).sum()),
        sinks=int((edges_NN.sum(1) == 0).sum()),
        listed=sum(node.listed for node in graph.nodes),
        parameters=sum(prod(node.shape) for node in graph.nodes if node.listed and "." in node.name),
        types=dict(Counter(node.type_name for node in graph.nodes).most_common()),
    )


def layers(edges_NN: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Length of the longest directed path that ends at each node.

    Edges against the order of the nodes, which only a graph with a cycle has, do not count.
    """
    layer_N = np.zeros(len(edges_NN), dtype=np.int64)
    for node in range(len(edges_NN)):
        before = np.flatnonzero(edges_NN[:node, node])
        if before.size:
            layer_N[node] = layer_N[before].max() + 1
    return layer_N
