"""Graphs of described networks: built on ``meta``, traced once, kept in the process.

A graph takes tens of milliseconds to trace, and a training run samples networks faster than that. The nodes, edges and
distances of a transformer depend on its depth and on what is tied, not on its widths, so networks of one depth share
a traced graph and differ in the shapes of their parameters only.
"""

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from logah.architectures import Architecture
from logah.net_graph import NetGraph, Node

KEPT_GRAPHS = 1024
"""Most graphs in the cache of a process; the one unused for longest goes first."""

WIDTHS = {
    "vit": ("hidden_dim", "mlp_dim", "num_heads", "num_classes", "dropout"),
    "gpt2": ("n_embd", "n_head", "n_inner", "vocab_size", "n_positions"),
    "llama": ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads"),
}
"""Options of a family that change shapes of parameters and nothing else of the graph."""

_graphs: OrderedDict[Hashable, NetGraph] = OrderedDict()
_templates: OrderedDict[Hashable, NetGraph] = OrderedDict()


def trace_architecture(architecture: Architecture, model: nn.Module | None = None, **options: Any) -> NetGraph:
    """The graph of ``architecture``; equal calls return the same object.

    Args:
        model: the network itself, on any device, if there is one already; only shapes are read from it.
        options: those of ``tracing.trace`` except ``inputs``. Attention of transformers' networks is traced in their
            ``eager`` implementation with ``attention="explicit"`` (the default), else in ``sdpa``.

    Raises: ConfigError for a network that cannot be built or traced.
    """
    chosen = _chosen(architecture, options)
    key = (architecture.key, chosen)
    if (known := _recall(_graphs, key)) is not None:
        return known
    template_key = _template_key(architecture, chosen)
    template = None if template_key is None else _recall(_templates, template_key)
    if template is None:
        graph = _traced(architecture, chosen)
        if template_key is not None:
            _remember(_templates, template_key, graph)
    else:
        shapes = _shapes(architecture.build_meta() if model is None else model)
        graph = replace(template, nodes=tuple(_reshaped(node, shapes) for node in template.nodes))
    _remember(_graphs, key, graph)
    return graph


def count_nodes(architecture: Architecture, **options: Any) -> int:
    """Nodes of the graph of ``architecture``; its shapes are not looked at where a graph of the same depth is known."""
    template_key = _template_key(architecture, _chosen(architecture, options))
    template = None if template_key is None else _recall(_templates, template_key)
    return len(trace_architecture(architecture, **options) if template is None else template)


def _chosen(architecture: Architecture, options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    if architecture.image_size is not None:
        options = {"image_size": architecture.image_size, **options}
    return tuple(sorted(options.items()))


def _traced(architecture: Architecture, chosen: tuple[tuple[str, Any], ...]) -> NetGraph:
    from logah.tracing import trace

    explicit = dict(chosen).get("attention", "explicit") == "explicit"
    return trace(architecture.build_meta(attention="eager" if explicit else "sdpa"), **dict(chosen))


def clear_graphs() -> None:
    """Empties the caches of this process."""
    _graphs.clear()
    _templates.clear()


def _template_key(architecture: Architecture, chosen: tuple) -> Hashable | None:
    """Equal for networks whose graphs differ in shapes only; None where that is not known to hold."""
    if architecture.family not in WIDTHS:
        return None
    widths = WIDTHS[architecture.family]
    rest = {name: value for name, value in architecture.options.items() if name not in widths}
    facts: list[object] = []
    if architecture.family == "llama":  # heads that share keys and values repeat them, an operation of its own
        facts.append(architecture.options["num_key_value_heads"] == architecture.options["num_attention_heads"])
    if architecture.family == "vit":
        facts.append(architecture.options["dropout"] > 0)
    return architecture.family, str(sorted(rest.items())), tuple(facts), chosen


def _shapes(model: nn.Module) -> Mapping[str, torch.Size]:
    # every name of a tied parameter: which of them a node has is the tracer's choice
    return {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}


def _reshaped(node: Node, shapes: Mapping[str, torch.Size]) -> Node:
    """``node`` with the shape that its parameter has in another network of the same graph."""
    shape = shapes.get(node.name)
    if shape is None or node.shape is None:
        return node
    if len(shape) == 3 and len(node.shape) == 4:  # a table of positions, recorded as a square image
        side = int((shape[1]) ** 0.5)
        return replace(node, shape=(1, shape[2], side, side))
    return replace(node, shape=tuple(shape))


def _recall(cache: OrderedDict[Hashable, NetGraph], key: Hashable) -> NetGraph | None:
    if key in cache:
        cache.move_to_end(key)
    return cache.get(key)


def _remember(cache: OrderedDict[Hashable, NetGraph], key: Hashable, graph: NetGraph) -> None:
    cache[key] = graph
    if len(cache) > KEPT_GRAPHS:
        cache.popitem(last=False)
