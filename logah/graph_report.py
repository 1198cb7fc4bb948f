"""What ``python -m logah.graph`` does: traces a network, shows the graph's properties, writes and draws it."""

import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from common.report.tables import Table
from logah.architecture_graphs import trace_architecture
from logah.architectures import resolve_target
from logah.graph_config import GraphConfig
from logah.graph_drawing import draw_graph
from logah.graph_files import SUFFIXES, read_graph, write_graph
from logah.graph_properties import GraphProperties, compute_properties
from logah.net_graph import NetGraph

WORDS = {
    "nodes": "nodes", "edges": "edges", "mean_degree": "edges at a node, mean", "max_degree": "edges at a node, most",
    "mean_path": "shortest path, mean", "longest_path": "shortest path, longest", "depth": "longest path",
    "sources": "nodes without a predecessor", "sinks": "nodes without a successor", "listed": "listed nodes",
    "parameters": "parameters in listed nodes",
}  # fmt: skip


def report_graph(config: GraphConfig) -> tuple[NetGraph, list[Table]]:
    """Traces (or reads) the graph, writes what the options ask for; returns it and the tables to print.

    Raises: ConfigError or DataError for a target, file or option that cannot be used.
    """
    started = time.perf_counter()
    if config.target.endswith(SUFFIXES) and _is_graph(Path(config.target)):
        graph = read_graph(Path(config.target))
    else:
        graph = trace_architecture(resolve_target(config.target), **config.trace_options)
    seconds = time.perf_counter() - started
    properties = compute_properties(graph)
    tables = [_property_table(config, graph, properties, seconds), _type_table(properties)]
    if config.show_nodes:
        tables.append(_node_table(graph))
    if config.output is not None:
        write_graph(graph, Path(config.output), overwrite=config.overwrite)
    if config.drawing is not None:
        draw_graph(graph, Path(config.drawing), labels=config.labels, overwrite=config.overwrite)
    return graph, tables


def _is_graph(path: Path) -> bool:
    """A JSON file may also be the configuration of a network."""
    return path.is_file() and (path.suffix == ".npz" or '"format": "logah graph' in path.read_text("utf-8", "replace"))


def _property_table(config: GraphConfig, graph: NetGraph, properties: GraphProperties, seconds: float) -> Table:
    values = asdict(properties)
    rows: list[tuple[str, object]] = [(words, values[name]) for name, words in WORDS.items()]
    rows += [("virtual edges", int((graph.distance_NN > 1).sum())), ("seconds", seconds)]
    rows += [("warning", text) for text in graph.facts.get("warnings", ())]
    caption = (
        f"{config.target}: {graph.version} graph, variant={graph.variant}, attention={graph.attention}, "
        f"ve_cutoff={graph.ve_cutoff}"
    )
    return Table(name="properties", columns=("property", "value"), rows=rows, caption=caption)


def _type_table(properties: GraphProperties) -> Table:
    rows = list(properties.types.items())
    return Table(name="types", columns=("type", "nodes"), rows=rows, caption="nodes by type")


def _node_table(graph: NetGraph) -> Table:
    rows = []
    for index, node in enumerate(graph.nodes):
        before = ", ".join(str(one) for one in np.flatnonzero(graph.distance_NN[:, index] == 1))
        head = "class head" if node.is_last_weight or node.is_last_bias else "yes" if node.listed else ""
        shape = "" if node.shape is None else " x ".join(map(str, node.shape))
        rows.append((str(index), node.name, node.type_name, shape, head, before))
    columns = ("", "name", "type", "shape", "listed", "predecessors")
    return Table(name="nodes", columns=columns, rows=rows, caption="nodes in topological order")
