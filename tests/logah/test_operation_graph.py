"""The editable graph of the tracer."""

import networkx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logah.operation_graph import OperationGraph, Record


def graph_of(count, edges):
    graph = OperationGraph()
    for index in range(count):
        graph.add_node(Record(f"n{index}"))
    for source, target in edges:
        graph.add_edge(source, target)
    return graph


edge_lists = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=30)


@given(edges=edge_lists, removed=st.sets(st.integers(0, 9), max_size=9))
def test_contraction_keeps_exactly_the_paths_through_removed_nodes(edges, removed):
    edges = [(min(edge), max(edge)) for edge in edges if edge[0] != edge[1]]
    graph = graph_of(10, edges)
    graph.contract(removed)
    whole = networkx.DiGraph(edges)
    whole.add_nodes_from(range(10))
    for source in graph.order:
        through = whole.subgraph(removed | {source}).copy()
        reach = {source} | networkx.descendants(through, source)
        expected = {target for node in reach for target in whole.successors(node)} - removed - {source}
        assert graph.successors[source] == expected
        assert all(source in graph.predecessors[target] for target in expected)


@given(edges=edge_lists)
def test_topological_order_is_that_of_networkx(edges):
    edges = [edge for edge in edges if edge[0] != edge[1]]
    graph = graph_of(10, edges)
    known = networkx.DiGraph()
    known.add_nodes_from(range(10))
    known.add_edges_from(sorted(set(edges)))
    if networkx.is_directed_acyclic_graph(known):
        assert graph.topological_order() == list(networkx.topological_sort(known))
    else:
        assert graph.topological_order() is None


def test_records_trade_places_while_edges_stay():
    graph = graph_of(3, [(0, 1), (1, 2)])
    graph.swap_records(0, 1)
    assert graph.names() == ["n1", "n0", "n2"]
    assert graph.successors[0] == {1}


@pytest.mark.parametrize("position, names", [(None, ["n0", "n1", "new"]), (1, ["n0", "new", "n1"])])
def test_a_node_is_inserted_where_it_is_wanted(position, names):
    graph = graph_of(2, [])
    graph.add_node(Record("new"), position=position)
    assert graph.names() == names
