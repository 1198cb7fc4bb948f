"""Edges of an automatic graph put where the computation has them, for reading as a chain of layers.

The walk along the autograd graph leaves the weight of a linear layer beside its bias (both point at what follows), lets
value projections by-pass the softmax, and so on; each function here mends one such pattern in place.

Source: GHN-3 (Knyazev et al., 2023), repairs of automatic graphs, and LoGAH (arXiv 2405.16287) for Llama. Positions are
mended as the released hypernetworks had them, including what is not the true computation (the untied head of GPT-2
stays a child of the input).
"""

from logah.node_types import is_position_owner, operation_prefix
from logah.operation_graph import OperationGraph, Record

ADD = "AddBackward0"


def chain_weights(graph: OperationGraph, *, llama: bool) -> None:
    """x -> bias <- weight becomes x -> weight -> bias.

    Every weight without predecessors trades places with a node it points at, if that node is of the same module, is a
    softmax, or (``llama``: layers without biases) whatever it is, and if the node has other predecessors.
    """
    rank = {slot: position for position, slot in enumerate(graph.order)}
    for slot in graph.order:
        if graph.predecessors[slot] or "weight" not in graph.name(slot):
            continue
        module = graph.records[slot].module
        targets = sorted(graph.successors[slot], key=rank.__getitem__)
        for target in targets:
            same_module = module is not None and graph.records[target].module is module
            if not (llama or same_module or is_softmax(graph, target)) or len(graph.predecessors[target]) < 2:
                continue
            graph.swap_records(slot, target)
            graph.remove_edge(slot, target)
            graph.add_edge(target, slot)
            if len(targets) == 1:
                graph.move_successors(target, slot)


def route_through_softmax(graph: OperationGraph) -> None:
    """Whatever is multiplied with attention weights enters the softmax node instead of by-passing it."""
    planned = []
    for softmax in graph.order:
        if not is_softmax(graph, softmax):
            continue
        for product in graph.successors[softmax]:
            for other in graph.predecessors[product] - {softmax}:
                single = not _has_second_path(graph, other, product)
                downstream = other in graph.successors[softmax]
                planned.append((softmax, product, other, single, downstream))
    for softmax, product, other, single, downstream in planned:
        if not single or not downstream:
            graph.remove_edge(other, product)
        if single and not downstream:
            graph.add_edge(other, softmax)


def route_llama_softmax(graph: OperationGraph) -> None:
    """Llama: rotated queries and keys and the values enter the softmax, projections do not enter it directly."""
    for softmax in graph.order:
        if not is_softmax(graph, softmax):
            continue
        for source in list(graph.predecessors[softmax]):
            if graph.records[source].module is not None and "weight" in graph.name(source):
                graph.remove_edge(source, softmax)
        for product in list(graph.successors[softmax]):
            for value in graph.predecessors[product] - {softmax}:
                for target in list(graph.successors[value]):
                    graph.remove_edge(value, target)
                graph.add_edge(value, softmax)


def mend_llama_residual(graph: OperationGraph) -> None:
    """The token embedding and the first residual sum of Llama, which ``chain_weights`` has mixed up."""
    by_name = {graph.name(slot): slot for slot in graph.order}
    embedding = next((slot for name, slot in by_name.items() if name.endswith("embed_tokens.weight")), None)
    if embedding is not None:
        token = graph.add_node(graph.records[embedding])
        graph.records[embedding] = Record(ADD)
        graph.add_edge(token, embedding)
        for target in list(graph.successors[embedding]):
            if graph.name(target).endswith("input_layernorm.weight"):
                graph.remove_edge(embedding, target)
                graph.add_edge(token, target)
        return
    head = by_name.get("lm_head.weight")
    projection = next((s for name, s in by_name.items() if name.endswith("layers.0.self_attn.o_proj.weight")), None)
    if head is None or projection is None:
        return
    for source in list(graph.predecessors[head]):
        graph.remove_edge(source, head)
    for target in list(graph.successors[projection]):
        if graph.name(target).endswith("input_layernorm.weight"):
            graph.remove_edge(projection, target)
    total = graph.add_node(Record(ADD), position=graph.order.index(projection) + 1)
    graph.move_successors(projection, total)
    graph.add_edge(head, total)
    graph.add_edge(projection, total)


def mend_swin_merging(graph: OperationGraph) -> None:
    """Swin's patch merging, whose reduction has no bias: norm -> reduction -> next (version 2: reduction -> norm)."""
    by_name = {graph.name(slot): slot for slot in graph.order}
    for name, reduction in by_name.items():
        if not name.endswith("reduction.weight") or graph.predecessors[reduction]:
            continue
        norm = by_name.get(name.removesuffix("reduction.weight") + "norm.weight")
        if norm is None:
            continue
        if norm in graph.successors[reduction]:  # version 2 normalises what it has reduced
            for source in graph.predecessors[norm] - {reduction}:
                graph.remove_edge(source, norm)
                graph.add_edge(source, reduction)
        else:
            graph.move_successors(norm, reduction)
            graph.add_edge(norm, reduction)


def mend_squeezenet_pooling(graph: OperationGraph) -> None:
    """SqueezeNet averages after its convolutional classifier; the graph shows the average before it."""
    by_name = {graph.name(slot): slot for slot in graph.order}
    classifier = next((s for n, s in by_name.items() if n.startswith("classifier") and n.endswith(".weight")), None)
    average = next((s for s in graph.order if operation_prefix(graph.name(s)) in ("Mean", "AdaptiveAvgPool2D")), None)
    if classifier is None or average is None or graph.successors[average]:
        return
    for source in list(graph.predecessors[average]):
        graph.remove_edge(source, average)
    for source in list(graph.predecessors[classifier]):
        graph.remove_edge(source, classifier)
        graph.add_edge(source, average)
    graph.add_edge(average, classifier)


def split_position_embedding(graph: OperationGraph) -> None:
    """torchvision's ViT: the node of the position embedding becomes a sum with the embedding as one more input."""
    for position, slot in enumerate(graph.order):
        if not is_position_owner(graph.records[slot].module):
            continue
        embedding = graph.add_node(graph.records[slot], position=position)
        graph.records[slot] = Record(ADD)
        graph.add_edge(embedding, slot)
        return


def is_softmax(graph: OperationGraph, slot: int) -> bool:
    return graph.name(slot).startswith("Softmax")


def _has_second_path(graph: OperationGraph, source: int, target: int) -> bool:
    """Whether a path leads from ``source`` to ``target`` besides the edge between them."""
    reached = {source}
    stack = [node for node in graph.successors[source] if node != target]
    while stack:
        node = stack.pop()
        if node == target:
            return True
        if node not in reached:
            reached.add(node)
            stack.extend(graph.successors[node])
    return False
