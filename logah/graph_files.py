"""Graphs in files: JSON to be read by people and other programs, ``.npz`` for large sets.

Both hold nodes, edges and how the graph was traced. Distances follow from the edges and are computed again on reading.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigError, DataError
from common.report.page import write_atomically
from logah.distances import shortest_paths
from logah.net_graph import NetGraph, Node
from logah.primitives import NUMBER, PRIMITIVES

FORMAT = "logah graph 1"
SUFFIXES = (".json", ".npz")
TRACED = ("ve_cutoff", "variant", "version", "attention")


def write_graph(graph: NetGraph, path: Path, *, overwrite: bool = False) -> Path:
    """``graph`` in ``path``, whose suffix decides on the format.

    Raises: ConfigError for another suffix or an existing file.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(
            f"output={path} has the suffix {path.suffix!r}; graphs are written to {' or '.join(SUFFIXES)}."
        )
    if path.exists() and not overwrite:
        raise ConfigError(f"output={path} exists; add overwrite=true, or choose another file.")
    content = graph_to_json(graph)
    if path.suffix == ".json":
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
        return path
    edges_E2 = np.array(content.pop("edges"), dtype=np.int32).reshape(-1, 2)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, edges=edges_E2, graph=np.frombuffer(json.dumps(content).encode(), dtype=np.uint8))
    write_atomically(path, buffer.getvalue())
    return path


def read_graph(path: Path) -> NetGraph:
    """The graph that ``write_graph`` wrote.

    Raises: DataError for a file that is missing, damaged or something else.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                content = json.loads(arrays["graph"].tobytes())
                content["edges"] = arrays["edges"].tolist()
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read as a graph ({error}); write one with python -m logah.graph.") from None
    return graph_from_json(content, str(path))


def graph_to_json(graph: NetGraph) -> dict[str, Any]:
    """``graph`` as JSON values; nodes by the names of their types, edges as pairs of numbers."""
    nodes = []
    for node in graph.nodes:
        values = asdict(node) | {"type": node.type_name}
        nodes.append({name: value for name, value in values.items() if value not in (None, False)})
    edges_E2 = np.argwhere(graph.distance_NN == 1).tolist()
    traced = {name: getattr(graph, name) for name in TRACED}
    return {"format": FORMAT, **traced, "facts": graph.facts, "nodes": nodes, "edges": edges_E2}


def graph_from_json(content: Any, source: str) -> NetGraph:
    """The inverse of ``graph_to_json``; ``source`` is what error messages call it.

    Raises: DataError naming the node or edge that cannot be.
    """
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise DataError(f"{source} is not a graph of this package; its format must be {FORMAT!r}.")
    try:
        nodes = tuple(_node(index, values, source) for index, values in enumerate(content["nodes"]))
        traced = {name: content[name] for name in TRACED}
        successors: list[list[int]] = [[] for _ in nodes]
        for number, (start, end) in enumerate(content["edges"]):
            if not (0 <= start < len(nodes) and 0 <= end < len(nodes)) or start == end:
                raise DataError(
                    f"{source}: edge {number} goes from node {start} to node {end}; there are nodes 0 to "
                    f"{len(nodes) - 1}, and no node precedes itself."
                )
            successors[start].append(end)
    except (KeyError, TypeError) as error:
        raise DataError(f"{source} is incomplete: {type(error).__name__} {error}; write it again.") from None
    distance_NN = shortest_paths(successors, ve_cutoff=int(traced["ve_cutoff"]))
    return NetGraph(nodes=nodes, distance_NN=distance_NN, facts=dict(content.get("facts", {})), **traced)


def _node(index: int, values: Mapping[str, Any], source: str) -> Node:
    if values["type"] not in NUMBER:
        raise DataError(
            f"{source}: node {index} ({values['name']}) has the type {values['type']!r}, which is none of "
            f"{', '.join(PRIMITIVES)}."
        )
    shape = values.get("shape")
    return Node(
        name=values["name"],
        type=NUMBER[values["type"]],
        shape=None if shape is None else tuple(shape),
        listed=bool(values.get("listed", False)),
        is_last_weight=bool(values.get("is_last_weight", False)),
        is_last_bias=bool(values.get("is_last_bias", False)),
    )
