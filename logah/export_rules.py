"""Which operation of an exported program becomes which node of a graph.

A ``Value`` is what is known of one tensor of the program: the nodes it comes from and the parameters that it is a view
of. ``Rules.apply`` derives the value of an operation from those of its operands, adding nodes on the way.
"""

from dataclasses import dataclass, field
from math import isqrt
from typing import Any

from torch import nn
from torch.fx import Node as Operation

from logah.export_graph import Draft, assemble
from logah.net_graph import NetGraph
from logah.primitives import NUMBER

LINEAR = ("linear", "addmm", "matmul", "mm", "bmm", "baddbmm", "einsum")
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose2d", "convolution")
NORMS = {"layer_norm": "ln", "batch_norm": "bn", "group_norm": "ln", "instance_norm": "bn", "rms_norm": "rmsnorm"}
MERGES = {"add": "sum", "cat": "concat", "stack": "concat", "mul": "mul"}
POOLS = {"max_pool2d": "max_pool", "max_pool2d_with_indices": "max_pool", "avg_pool2d": "avg_pool"}
GLOBAL_POOLS = ("adaptive_avg_pool2d", "adaptive_avg_pool1d")
TABLES = ("pos_emb", "position", "class_token", "cls_token", "dist_token", "reg_token")
ATTENTIONS = ("softmax", "_softmax", "_safe_softmax", "scaled_dot_product_attention")
FUSED_ATTENTION = ATTENTIONS[-1]
MODULE_KINDS = (*LINEAR, *CONVOLUTIONS, *NORMS, "embedding")  # of operations that use a parameter, not merely view it


@dataclass(frozen=True)
class Value:
    """What one tensor of the program comes from.

    Attributes:
        sources: numbers of nodes, in order of appearance.
        parameters: names, while nothing but views was made of them.
        is_attention: whether it holds the weights of an attention whose values are still to come.
    """

    sources: tuple[int, ...] = ()
    parameters: tuple[str, ...] = ()
    is_attention: bool = False


NOTHING = Value()


@dataclass
class Rules:
    """The graph of ``model`` as far as its program has been read."""

    model: nn.Module
    variant: str
    attention: str
    nodes: list[Draft] = field(default_factory=lambda: [Draft("input", NUMBER["input"])])
    _values: dict[Operation, Value] = field(default_factory=dict)
    _number_of: dict[str, int] = field(default_factory=dict)  # of a parameter's node
    _outputs: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._tensors = dict(self.model.named_parameters(remove_duplicate=False))

    def read_input(self, operation: Operation) -> None:
        self._values[operation] = Value(sources=(0,))

    def read_parameter(self, operation: Operation, name: str) -> None:
        self._values[operation] = Value(parameters=(name,))

    def finish(self, operands: list[Operation]) -> None:
        """``operands`` are the outputs of the program."""
        self._outputs = list(_union(self._value(one).sources for one in operands))

    def graph(self, ve_cutoff: int) -> NetGraph:
        return assemble(
            self.nodes,
            self._outputs,
            model=self.model,
            ve_cutoff=ve_cutoff,
            variant=self.variant,
            attention=self.attention,
        )

    def apply(self, operation: Operation) -> None:
        """Sets the value of ``operation``."""
        kind = operation_name(operation)
        operands = [self._value(one) for one in operation.all_input_nodes]
        parameters = _union(one.parameters for one in operands)
        sources = _union(one.sources for one in operands)
        if parameters and kind in ATTENTIONS:  # a learned bias of the attention
            tables = tuple(self._parameter(operation, one, "pos_enc", (), listed=False) for one in parameters)
            value = self._without(operation, kind, operands, sources + tables)
        elif parameters and (sources or kind in MODULE_KINDS):
            value = self._with_parameters(operation, kind, operands, parameters, sources)
        elif parameters:
            value = Value(parameters=parameters)  # a view of it, or of several
        else:
            value = self._without(operation, kind, operands, sources)
        self._values[operation] = value

    def _value(self, operation: Operation) -> Value:
        return self._values.get(operation, NOTHING)

    # ------------------------------------------------------------------------------------- operations on activations

    def _without(self, operation: Operation, kind: str, operands: list[Value], sources: tuple[int, ...]) -> Value:
        if not sources:
            return NOTHING
        if kind in MERGES:
            return Value(self._merged(operation, kind, [one.sources for one in operands if one.sources]))
        if kind in POOLS:
            return self._node(operation, kind, POOLS[kind], sources, shape=(1, 1, *_kernel(operation)))
        if kind in GLOBAL_POOLS or kind == "mean" and reduces_positions(operation):
            return self._node(operation, kind, "glob_avg", sources)
        if kind in ATTENTIONS and kind != FUSED_ATTENTION:
            return Value(self._node(operation, kind, "msa", sources).sources, is_attention=True)
        if kind == FUSED_ATTENTION and self.attention == "explicit":
            return self._node(operation, kind, "msa", sources)
        if kind == "neg" and self.variant == "llm":
            return self._node(operation, kind, "rot_emb", sources)
        weights = [one for one in operands if one.is_attention]
        if weights and kind in LINEAR:
            return self._attended(weights[0], [one for one in operands if not one.is_attention])
        return Value(sources, is_attention=bool(weights) and len(operands) == 1)

    def _node(
        self, operation: Operation, kind: str, type_name: str, sources: tuple[int, ...], shape: tuple | None = None
    ) -> Value:
        path = module_path(operation)
        name = f"{path}/{kind}" if path else kind
        self.nodes.append(Draft(name, NUMBER[type_name], shape, shape is not None, list(sources)))
        return Value((len(self.nodes) - 1,))

    def _merged(self, operation: Operation, kind: str, groups: list[tuple[int, ...]]) -> tuple[int, ...]:
        """Sources of a sum, product or concatenation: a node of its own if its operands come from different nodes."""
        sources = _union(groups)
        rotated = [one for one in sources if self.nodes[one].type == NUMBER["rot_emb"]]
        # x cos + rotate(x) sin: the rotation stands for all of it
        hidden = {source for one in rotated for source in self.nodes[one].predecessors}
        sources = tuple(one for one in sources if one not in hidden)
        if len(sources) == 1 or len(set(groups)) == 1:
            return sources
        type_name = self._product if MERGES[kind] == "mul" else MERGES[kind]
        return self._node(operation, kind, type_name, sources).sources

    @property
    def _product(self) -> str:
        return "gate" if self.variant == "llm" else "cse"

    def _attended(self, weights: Value, values: list[Value]) -> Value:
        """The product of attention weights and values, which become predecessors of the attention."""
        (number,) = weights.sources
        for source in _union(one.sources for one in values):
            if source not in self.nodes[number].predecessors and not self._descends(source, number):
                self.nodes[number].predecessors.append(source)
        return Value((number,))

    def _descends(self, number: int, ancestor: int) -> bool:
        seen, open_numbers = set(), [number]
        while open_numbers:
            one = open_numbers.pop()
            if one == ancestor:
                return True
            fresh = [other for other in self.nodes[one].predecessors if other not in seen]
            seen.update(fresh)
            open_numbers += fresh
        return False

    # -------------------------------------------------------------------------------------- operations on parameters

    def _with_parameters(
        self,
        operation: Operation,
        kind: str,
        operands: list[Value],
        parameters: tuple[str, ...],
        sources: tuple[int, ...],
    ) -> Value:
        if kind in ("cat", "stack") or kind == "add" and not self._is_bias(parameters):
            tables = [self._parameter(operation, name, "pos_enc", (), listed=_is_table(name)) for name in parameters]
            groups = [one.sources for one in operands if one.sources] + [(number,) for number in tables]
            return Value(self._merged(operation, kind, groups))
        if kind in NORMS or self._normalises(kind, parameters):
            # the node of a norm stands for its scale and its shift, also where the two are separate operations
            parameters = sorted(parameters, key=lambda name: "bias" in name)[:1]
            if kind not in NORMS and parameters[0].removesuffix("bias") + "weight" in self._number_of:
                return Value(sources)
        for name in sorted(parameters, key=self._is_vector):
            type_name, listed = self._role(operation, kind, name)
            sources = (self._parameter(operation, name, type_name, sources, listed=listed),)
        return Value(sources)

    def _is_vector(self, name: str) -> bool:
        return "bias" in _leaf(name) or self._tensors[name].dim() < 2

    def _is_bias(self, parameters: tuple[str, ...]) -> bool:
        return all(self._tensors[name].dim() == 1 for name in parameters)

    def _owner(self, name: str) -> str:
        return type(self.model.get_submodule(name.rpartition(".")[0])).__name__

    def _normalises(self, kind: str, parameters: tuple[str, ...]) -> bool:
        return kind in ("mul", "add") and any("norm" in self._owner(name).lower() for name in parameters)

    def _role(self, operation: Operation, kind: str, name: str) -> tuple[str, bool]:
        """Type of a parameter's node, and whether it is listed (predicted)."""
        owner = self._owner(name)
        if kind in NORMS:
            return ("bias" if "bias" in _leaf(name) else NORMS[kind]), True
        if "norm" in owner.lower():
            return ("rmsnorm" if "rms" in owner.lower() else "ln"), True
        if kind == "mul":
            return self._product, False  # a layer's scale keeps its initial value
        if self._is_vector(name):
            return "bias", True
        if kind in CONVOLUTIONS:
            return _convolution_type(self.model.get_submodule(name.rpartition(".")[0])), True
        if kind == "embedding":
            return "pos_enc", True
        return "conv", kind in LINEAR

    def _parameter(
        self, operation: Operation, name: str, type_name: str, sources: tuple[int, ...], *, listed: bool
    ) -> int:
        """The node of a parameter that follows ``sources``; another, unlisted one where it is used again."""
        known = self._number_of.get(name)
        if known is not None and not sources:
            return known
        again = known is not None
        alias = f"{module_path(operation)}.{_leaf(name)}"  # of a tied parameter: the name at the place of this use
        self.nodes.append(
            Draft(
                alias if self._tensors.get(alias) is self._tensors[name] else name,
                NUMBER[type_name],
                recorded_shape(tuple(self._tensors[name].shape)),
                listed and not again,
                list(sources),
                is_parameter=True,
            )
        )
        self._number_of.setdefault(name, len(self.nodes) - 1)
        return len(self.nodes) - 1


def operation_name(operation: Operation) -> str:
    """``add`` for ``aten.add_.Tensor``."""
    schema = getattr(operation.target, "_schema", None)
    name = schema.name.split("::")[-1] if schema is not None else getattr(operation.target, "__name__", "")
    return name.rstrip("_")


def module_path(operation: Operation) -> str:
    """Name of the innermost module that called ``operation``; empty for the model itself."""
    stack = operation.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def recorded_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A parameter's shape as the shape encoder reads it: position tables as the square image that they cover."""
    if len(shape) == 3 and shape[0] == 1 and shape[1] > 1 and shape[2] > 1:
        side = isqrt(shape[1])
        return (1, shape[2], side, side)
    return shape


def reduces_positions(operation: Operation) -> bool:
    """Whether a mean is taken over all positions (of an image or a sequence) rather than over channels."""
    value = operation.all_input_nodes[0].meta.get("val")
    if value is None or len(operation.args) < 2 or operation.args[1] is None:
        return False
    rank, axes = value.dim(), operation.args[1]
    axes = {axis % rank for axis in (axes if isinstance(axes, (list, tuple)) else [axes])}
    return axes in ({2, 3}, {1, 2}) if rank == 4 else rank == 3 and axes == {1}


def _kernel(operation: Operation) -> tuple[int, int]:
    size: Any = operation.args[1] if len(operation.args) > 1 else operation.kwargs.get("kernel_size", 3)
    size = [size] if isinstance(size, int) else list(size)
    return (size[0], size[-1])


def _convolution_type(module: nn.Module) -> str:
    if getattr(module, "groups", 1) == 1:
        return "conv"
    dilation = getattr(module, "dilation", (1,))
    return "dil_conv" if min(dilation) > 1 else "sep_conv"


def _is_table(name: str) -> bool:
    """Whether it is added to, or stands among, the positions of a sequence; tables of relative positions are not."""
    return any(part in _leaf(name) for part in TABLES) and "rel" not in _leaf(name)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _union(groups: Any) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(one for group in groups for one in group))
