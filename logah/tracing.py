"""The computational graph of a network, with the nodes and edges that released hypernetworks were trained on.

Works on real and on meta tensors with the same result; the network is left as it was.

Source: automatic graphs of GHN-3 (Knyazev et al., 2023) and LoGAH (arXiv 2405.16287).
"""

import gc
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

from torch import Tensor, nn

from common.config import require_at_least, require_choice
from common.errors import ConfigError
from logah.autograd_walk import parameter_owners, walk
from logah.distances import shortest_paths
from logah.explicit_attention import visible_softmax
from logah.graph_filters import NetFacts, drop_single_input_joins, net_facts
from logah.graph_filters import reduce_graph as reduce_operations
from logah.graph_repairs import (
    chain_weights,
    mend_llama_residual,
    mend_squeezenet_pooling,
    mend_swin_merging,
    route_llama_softmax,
    route_through_softmax,
    split_position_embedding,
)
from logah.model_config import ATTENTIONS, GRAPH_VERSIONS, VARIANTS
from logah.net_graph import NetGraph, Node
from logah.node_types import node_type
from logah.operation_graph import OperationGraph, Record
from logah.primitives import NUMBER
from logah.tracing_inputs import is_language_model, run_model

logger = logging.getLogger(__name__)
POOLS = (NUMBER["max_pool"], NUMBER["avg_pool"])
UNKNOWN_WINDOW = 3
FUSED = ("ScaledDotProduct", "SafeSoftmax", "FlexAttention", "FlashAttention")


def trace(
    model: nn.Module,
    *,
    variant: Literal["auto", "vision", "llm"] = "auto",
    attention: Literal["explicit", "as_is"] = "explicit",
    version: Literal["reference", "v2"] = "reference",
    ve_cutoff: int = 50,
    inputs: Any = None,
    image_size: int | Sequence[int] | None = None,
    reduce_graph: bool = True,
    list_all_nodes: bool = False,
    fix_weight_edges: bool = True,
    fix_softmax_edges: bool = True,
) -> NetGraph:
    """The graph of ``model``, real or meta, in the mode (training or evaluation) it is in.

    Args:
        variant: table of node types: multiplications are squeeze-excites (vision) or gates (llm).
        attention: ``explicit`` shows the softmax of fused attention kernels, ``as_is`` traces what the network calls.
        version: ``reference`` as released hypernetworks know graphs, ``v2`` from ``torch.export`` with true edges.
        ve_cutoff: longest path that becomes a virtual edge.
        inputs, image_size: see ``tracing_inputs.run_model``.
        reduce_graph: False keeps every operation.
        list_all_nodes: operations count as listed too.
        fix_weight_edges, fix_softmax_edges: False leaves the edges of the autograd graph.

    Raises: ConfigError when the forward pass fails (naming module and operation) or gives nothing to differentiate.
    """
    require_choice("variant", variant, ("auto", *VARIANTS))
    require_choice("attention", attention, ATTENTIONS)
    require_choice("version", version, GRAPH_VERSIONS)
    require_at_least("ve_cutoff", ve_cutoff, 1)
    if version == "v2":
        from logah.export_tracing import trace_exported  # torch.export takes seconds to import

        return trace_exported(
            model, variant=variant, attention=attention, ve_cutoff=ve_cutoff, inputs=inputs, image_size=image_size
        )
    if variant == "auto":
        variant = "llm" if is_language_model(model) else "vision"
    warnings: list[str] = []
    with _collector_paused():
        with visible_softmax() if attention == "explicit" else nullcontext():
            tensors = run_model(model, inputs=inputs, image_size=image_size)
        graph = _walked(model, tensors, warnings)
        del tensors
    warnings += _hidden_parts(graph, attention)
    facts = net_facts(model, graph)
    _simplify(graph, facts, model, variant, reduce_graph, fix_weight_edges, fix_softmax_edges)
    warnings += _close(graph)
    for warning in warnings:
        logger.warning("graph of %s: %s", type(model).__name__, warning)
    nodes = _nodes(graph, variant, list_all_nodes)
    position = {slot: index for index, slot in enumerate(graph.order)}
    successors = [sorted(position[target] for target in graph.successors[slot]) for slot in graph.order]
    return NetGraph(
        nodes=nodes,
        distance_NN=shortest_paths(successors, ve_cutoff=ve_cutoff),
        ve_cutoff=ve_cutoff,
        variant=variant,
        version=version,
        attention=attention,
        facts={"class": type(model).__name__, "warnings": warnings},
    )


def _walked(model: nn.Module, tensors: Sequence[Tensor], warnings: list[str]) -> OperationGraph:
    """Parameters and operations behind the outputs of ``model``."""
    outputs = [tensor for tensor in tensors if tensor.grad_fn is not None]
    if not outputs:
        raise ConfigError(
            f"{type(model).__name__} gives no output with a grad_fn ({len(tensors)} tensors in its output): nothing "
            "leads back to its parameters. Return the scores themselves, not a detached or integer tensor."
        )
    lost = sum(tensor.grad_fn is None and tensor.is_floating_point() for tensor in tensors)
    if lost:
        warnings.append(f"{lost} of its outputs do not depend on any parameter and are left out")
    return walk(outputs, parameter_owners(model))


def _hidden_parts(graph: OperationGraph, attention: str) -> list[str]:
    """What the walk could not look into."""
    operations = {record.name for record in graph.records if record.module is None}
    hidden = []
    if any(name.startswith("CheckpointFunction") for name in operations):
        hidden.append("recomputation (activation checkpointing) hides whole blocks from it; switch it off to trace")
    if attention == "explicit" and any(part in name for name in operations for part in FUSED):
        hidden.append("some attention stays fused, without a softmax, although attention=explicit was asked for")
    return hidden


@contextmanager
def _collector_paused() -> Iterator[None]:
    """A trace makes thousands of small objects and no garbage cycles; a full collection amid it takes 0.2 s."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _simplify(
    graph: OperationGraph,
    facts: NetFacts,
    model: nn.Module,
    variant: str,
    reduce: bool,
    fix_weights: bool,
    fix_softmax: bool,
) -> None:
    """Filters and repairs in the order of the reference: for Llama the weights come before the first filter."""
    name = type(model).__name__
    if facts.llama and fix_weights:
        chain_weights(graph, llama=True)
    if reduce:
        reduce_operations(graph, facts, variant)
    if not facts.llama and fix_weights:
        chain_weights(graph, llama=False)
    if fix_softmax and facts.llama:
        route_llama_softmax(graph)
    elif fix_softmax:
        route_through_softmax(graph)
    if name.startswith("Swin"):
        mend_swin_merging(graph)
    if name.startswith("SqueezeNet"):
        mend_squeezenet_pooling(graph)
    if reduce:
        drop_single_input_joins(graph, facts)
    if facts.llama and fix_weights:
        mend_llama_residual(graph)  # last: the sum it adds would not pass the neighbour rules of the filter


def _close(graph: OperationGraph) -> list[str]:
    """Appends the input, sorts, and splits the position embedding; what there is to warn about."""
    sources = [slot for slot in graph.order if not graph.predecessors[slot] and "weight" in graph.name(slot)]
    entry = graph.add_node(Record("input"))
    for slot in sources:
        graph.add_edge(entry, slot)
    for slot in graph.order:
        graph.remove_edge(slot, slot)
    warnings = []
    order = graph.topological_order()
    if order is None:
        warnings.append("it has a cycle, its nodes stay in the order of the walk; version=v2 traces true edges")
    else:
        graph.order = order
    split_position_embedding(graph)
    if graph.order[-1] not in _reached(graph, entry):
        warnings.append(f"no path leads from the input to its last node {graph.name(graph.order[-1])}")
    return warnings


def _reached(graph: OperationGraph, start: int) -> set[int]:
    reached, stack = {start}, [start]
    while stack:
        fresh = graph.successors[stack.pop()] - reached
        reached |= fresh
        stack.extend(fresh)
    return reached


def _nodes(graph: OperationGraph, variant: str, list_all: bool) -> tuple[Node, ...]:
    count = len(graph)
    nodes = []
    for index, slot in enumerate(graph.order):
        record = graph.records[slot]
        kind = node_type(record, variant)
        of_module = record.module is not None
        nodes.append(
            Node(
                name=record.name,
                type=kind,
                shape=_shape(record, kind, last=index == count - 2),
                listed=of_module or kind in POOLS or list_all,
                is_last_weight=of_module and index == count - 2 and ".weight" in record.name,
                is_last_bias=of_module and index == count - 1 and ".bias" in record.name,
            )
        )
    return tuple(nodes)


def _shape(record: Record, kind: int, *, last: bool) -> tuple[int, ...] | None:
    """Sizes as the shape encoder reads them; ``last``: the node before the last one."""
    size = record.size
    if size is None:
        if kind not in POOLS:
            return None
        window = record.kernel or (UNKNOWN_WINDOW,)
        return (1, 1, window[0], window[-1])
    if len(size) == 3 and size[0] == 1 and min(size[1:]) > 1:
        side = math.isqrt(size[1])
        return (1, size[2], side, side)
    if last and len(size) == 4 and size[2:] == (1, 1):
        return size[:2]
    return size
