"""From the outputs of a network to the graph of its parameters and operations, along the autograd graph.

Source: GHN-3 (Knyazev et al., 2023) and PPUDA (Knyazev et al., 2021), automatic construction of graphs. Theirs is
recursive; this walk keeps a stack of its own and so has no limit of depth.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from logah.operation_graph import OperationGraph, Record

ParameterOwners = dict[int, tuple[str, nn.Module]]


def parameter_owners(model: nn.Module) -> ParameterOwners:
    """id of every parameter -> (its full name, its module); a tied parameter belongs to its last owner."""
    owners: ParameterOwners = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)] = (f"{path}.{name}" if path else name, module)
    return owners


def walk(outputs: Sequence[Tensor], owners: ParameterOwners) -> OperationGraph:
    """The graph of everything ``outputs`` depend on, nodes in the order of a depth-first walk from the outputs.

    A backward function that reads parameters is replaced by these; any other becomes a node named by its class. The
    bias of a layer follows its weight; a weight that is transposed first still hangs beside its layer (see
    ``graph_repairs``).
    """
    graph = OperationGraph()
    links: dict[Any, tuple[int | None, str]] = {}  # function -> (node its consumers are joined with, name)
    for output in outputs:
        stack: list[tuple[Any, int | None]] = [(output.grad_fn, None)]
        while stack:
            function, consumer = stack.pop()
            known = links.get(function)
            if known is None:
                start, known = _create(graph, function, owners, links)
                for following, _ in reversed(function.next_functions):
                    if following is not None:
                        stack.append((following, start))
            link, name = known
            if consumer is None or link is None or link == consumer:
                continue
            if "bias" in name:
                graph.add_edge(consumer, link)
            else:
                graph.add_edge(link, consumer)
    return graph


def _create(
    graph: OperationGraph, function: Any, owners: ParameterOwners, links: dict
) -> tuple[int | None, tuple[int | None, str]]:
    """Makes the nodes of one function: (its first node, what consumers see of it)."""
    label = type(function).__name__
    if label == "AccumulateGrad":  # of a tensor that is no parameter, such as an input that requires gradients
        links[function] = (None, label)
        return None, links[function]
    start: int | None = None
    link: int | None = None
    for following, _ in function.next_functions:
        variable = getattr(following, "variable", None)
        if variable is None or id(variable) not in owners:
            continue
        if following in links:  # tied: met before
            link = links[following][0]
        else:
            name, module = owners[id(variable)]
            link = graph.add_node(Record(name, module, tuple(variable.shape)))
            links[following] = (link, name)
        start = link if start is None else start
    if start is None:
        start = link = graph.add_node(Record(label, kernel=_kernel(function, label)))
    links[function] = (link, label)
    return start, links[function]


def _kernel(function: Any, label: str) -> tuple[int, ...] | None:
    """Window of a pool."""
    if "Pool" not in label:
        return None
    size = getattr(function, "_saved_kernel_size", None)
    return None if size is None else tuple(int(edge) for edge in size)
