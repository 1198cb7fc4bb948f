"""Drawings of graphs: nodes in layers from input to output, coloured by type, with a legend.

Dimensions: N nodes.
"""

import io
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch
from numpy.typing import NDArray

from common.errors import ConfigError
from common.report.page import write_atomically
from logah.graph_properties import layers
from logah.net_graph import NetGraph

SUFFIXES = (".pdf", ".png", ".svg")
COLOURS = {
    "input": "#1f2328", "conv": "#1f5fbf", "sep_conv": "#6ea8fe", "dil_conv": "#0b3d91", "bias": "#b8c4d6",
    "ln": "#0f8a74", "bn": "#44c7ac", "rmsnorm": "#0a5c4e", "msa": "#d4611a", "rot_emb": "#f59b5b", "gate": "#a63d00",
    "cse": "#9b3fa6", "sum": "#8a6d00", "concat": "#d8b84a", "pos_enc": "#c2255c", "max_pool": "#5c6470",
    "avg_pool": "#a6afbb", "glob_avg": "#39424e",
}  # fmt: skip
LAYER_INCHES, COLUMN_INCHES, LABEL_INCHES = 0.34, 0.9, 3.2
MAX_INCHES = 180.0  # PDF viewers open no larger page; longer graphs are drawn more densely
PNG_DOTS = 16_000  # most per side
DPI = 110


def draw_graph(graph: NetGraph, path: Path, *, labels: bool = True, overwrite: bool = False) -> Path:
    """Draws ``graph`` to a ``.pdf``, ``.png`` or ``.svg`` file.

    Args:
        labels: whether the names and shapes of nodes are written beside them.

    Raises: ConfigError for another suffix or an existing file.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"drawing={path} has the suffix {path.suffix!r}; choose {', '.join(SUFFIXES)}.")
    if path.exists() and not overwrite:
        raise ConfigError(f"drawing={path} exists; add overwrite=true, or choose another file.")
    figure = _figure(graph, labels)
    buffer = io.BytesIO()
    dpi = min(DPI, PNG_DOTS / max(figure.get_size_inches()))
    undated = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}, ".png": {"Software": None}}[path.suffix]
    figure.savefig(buffer, format=path.suffix[1:], dpi=dpi, metadata=undated)  # equal graphs give equal files
    write_atomically(path, buffer.getvalue())
    return path


def place_nodes(graph: NetGraph) -> NDArray[np.float64]:
    """``(N, 2)``: column and layer of every node.

    A node stands in the layer of its longest path from a source, or just before its first successor if nothing
    precedes it; nodes of one layer are ordered by the mean column of their predecessors.
    """
    edges_NN = graph.distance_NN == 1
    layer_N = layers(edges_NN)
    for node in range(1, len(graph)):
        after = np.flatnonzero(edges_NN[node])
        if not edges_NN[:, node].any() and after.size:
            layer_N[node] = max(layer_N[after].min() - 1, 0)
    members: dict[int, list[int]] = defaultdict(list)
    for node, layer in enumerate(layer_N):
        members[int(layer)].append(node)
    place_N2 = np.zeros((len(graph), 2))
    for layer in sorted(members):
        wanted = {
            node: place_N2[before, 0].mean() if (before := np.flatnonzero(edges_NN[:, node])).size else 1.0
            for node in members[layer]
        }
        ordered = sorted(members[layer], key=lambda node: (wanted[node], node))
        middle = np.mean(list(wanted.values()))
        for column, node in enumerate(ordered):
            place_N2[node] = middle + column - (len(ordered) - 1) / 2, layer
    return place_N2


def _figure(graph: NetGraph, labels: bool) -> Figure:
    place_N2 = place_nodes(graph)
    place_N2[:, 0] -= place_N2[:, 0].min()
    columns, depth = place_N2[:, 0].max() + 1, place_N2[:, 1].max() + 1
    kinds = [kind for kind in COLOURS if any(node.type_name == kind for node in graph.nodes)]
    height = min(max(depth * LAYER_INCHES, 0.25 * len(kinds)) + 0.8, MAX_INCHES)
    width = columns * COLUMN_INCHES + (LABEL_INCHES if labels else 0.4) + 1.4
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(-0.7, width / COLUMN_INCHES - 0.7)
    ax.set_ylim(depth, -1.2)
    ax.axis("off")
    for start, end in np.argwhere(graph.distance_NN == 1):
        # paths that jump over layers bend round the nodes between
        jump = place_N2[end, 1] - place_N2[start, 1]
        bend = 0.0 if abs(jump) <= 1 else 0.25 if place_N2[start, 0] <= place_N2[end, 0] else -0.25
        ax.add_patch(
            FancyArrowPatch(
                place_N2[start], place_N2[end], connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>",
                mutation_scale=6, shrinkA=4, shrinkB=4, linewidth=0.6, color="#8b949e",
            )
        )  # fmt: skip
    for kind in kinds:
        chosen = [index for index, node in enumerate(graph.nodes) if node.type_name == kind]
        ax.scatter(*place_N2[chosen].T, s=38, color=COLOURS[kind], zorder=3)
    if labels:
        _write_labels(ax, graph, place_N2)
    handles = [Line2D([], [], marker="o", linestyle="", color=COLOURS[kind], label=kind) for kind in kinds]
    figure.legend(handles=handles, loc="upper right", fontsize=7.5, frameon=False)
    title = f"{graph.facts.get('class', 'network')}: {len(graph)} nodes, {graph.version} graph"
    ax.text(-0.5, -0.8, title, fontsize=9, weight="bold")
    return figure


def _write_labels(ax, graph: NetGraph, place_N2: NDArray[np.float64]) -> None:
    """Names to the right of each layer, from the left node to the right one."""
    names: dict[float, list[str]] = defaultdict(list)
    for index in np.lexsort((place_N2[:, 0], place_N2[:, 1])):
        node = graph.nodes[index]
        shape = f" {'x'.join(map(str, node.shape))}" if node.shape else ""
        names[place_N2[index, 1]].append(f"{node.name}{shape}")
    for layer, texts in names.items():
        right = place_N2[place_N2[:, 1] == layer, 0].max()
        ax.text(right + 0.2, layer, "  |  ".join(texts), fontsize=5.5, va="center", color="#39424e")
