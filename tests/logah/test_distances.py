"""Shortest paths and their cut-off."""

import networkx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logah.distances import shortest_paths


@given(
    edges=st.sets(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=30),
    cutoff=st.integers(1, 12),
    acyclic=st.booleans(),
)
def test_distances_are_those_of_breadth_first_search(edges, cutoff, acyclic):
    edges = {(min(e), max(e)) if acyclic else e for e in edges if e[0] != e[1]}
    graph = networkx.DiGraph(edges)
    graph.add_nodes_from(range(12))
    expected = np.zeros((12, 12), dtype=np.int16)
    for source, lengths in networkx.all_pairs_shortest_path_length(graph, cutoff=cutoff):
        for target, length in lengths.items():
            expected[source, target] = length
    successors = [sorted(graph.successors(node)) for node in range(12)]
    np.testing.assert_array_equal(shortest_paths(successors, ve_cutoff=cutoff), expected)


@pytest.mark.parametrize("cutoff, longest", [(1, 1), (3, 3), (50, 50), (250, 79)])
def test_longest_virtual_edge_is_the_cutoff(cutoff, longest):
    chain = [[node + 1] for node in range(79)] + [[]]
    distance_NN = shortest_paths(chain, ve_cutoff=cutoff)
    assert distance_NN.max() == longest
    assert distance_NN.dtype == np.int16
