"""Which node of a graph gives which parameter of a network, and in what form it is decoded.

Source: LoGAH and GHN-3; ``logah/README.md`` has the table (facts ``groups`` of the golden cases).
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from common.errors import ConfigError
from logah.net_graph import NetGraph
from logah.primitives import NORMS_WITH_BIAS
from logah.tiling import Shape, grid_side

Key = tuple[int, ...]
MaxShape = tuple[int, int, int, int]

WEIGHT_ROW, BIAS_ROW = 0, 1
RESIDUAL_NAMES = ("c_proj.weight", "o_proj.weight")


@dataclass(frozen=True)
class Target:
    """One parameter and where it comes from.

    Attributes:
        names: of the parameter; more than one if it is tied.
        node: index in the graph.
        shape: of the parameter.
        role: ``vector``, ``class_bias``, ``class_weight``, ``matrix``, ``kernel``, ``position`` or ``tensor3``.
        row: 0 for scales, 1 for biases (vectors only).
        embedding: held by an ``nn.Embedding``, whose scale is left as decoded.
    """

    names: tuple[str, ...]
    node: int
    shape: Shape
    role: str
    row: int = WEIGHT_ROW
    embedding: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def residual(self) -> bool:
        """Whether it is the last map of a residual branch."""
        return self.name.endswith(RESIDUAL_NAMES)

    def key(self, max_shape: MaxShape) -> Key:
        """What the released implementation groups by: parameters of one key are decoded in one call, cut afterwards."""
        shape = self.shape
        if self.role in ("vector", "class_bias"):
            return (rounded(shape[0], max_shape[0]), 0 if self.role == "vector" else -1)
        if self.role == "class_weight":
            return (rounded(shape[0], max_shape[0]), rounded(shape[1], max_shape[1]))
        if self.role == "position":
            side = grid_side(shape[1])[0]
            return (1, shape[2], side, side)
        if self.role == "tensor3":
            return tuple(rounded(size, most) for size, most in zip(shape, max_shape, strict=False))
        spatial = shape[2:] if len(shape) == 4 else (1, 1)
        return (rounded(shape[0], max_shape[0]), rounded(shape[1], max_shape[1]), *spatial)


def rounded(size: int, most: int) -> int:
    """The size at which a dimension is decoded: at most ``most``, multiples of three grow by a third, large ones to
    ``most``, so that fewer distinct sizes occur."""
    size = min(size, most)
    if size % 3 == 0:
        size = size // 3 * 4
    return most if size >= most / 2 else size


@dataclass(frozen=True)
class TargetPlan:
    """All parameters of a network.

    Attributes:
        targets: those that are decoded, in the order of their nodes.
        uncovered: names (every one of a tied parameter) of those that no node gives.
        initializer_range: the network's own, None if its config names none.
        num_blocks: residual blocks of a language model, else None.
    """

    targets: tuple[Target, ...]
    uncovered: tuple[str, ...]
    initializer_range: float | None = None
    num_blocks: int | None = None

    @property
    def covered(self) -> tuple[str, ...]:
        return tuple(name for target in self.targets for name in target.names)

    def groups(self, max_shape: MaxShape) -> dict[Key, list[int]]:
        """Nodes by key, each once, in the order in which keys appear."""
        found: dict[Key, list[int]] = {}
        for target in self.targets:
            nodes = found.setdefault(target.key(max_shape), [])
            if target.node not in nodes:
                nodes.append(target.node)
        return found


def plan_targets(graph: NetGraph, model: nn.Module, *, predict_class_layers: bool = True) -> TargetPlan:
    """The targets of ``model`` (real or on the meta device), whose graph is ``graph``.

    Args:
        predict_class_layers: False leaves the class layer's weight and bias as they are, for another set of classes.

    Raises: ConfigError if a parameter of the graph is not one of the model.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = _names_of_each(parameters.items())
    owners = {f"{path}.{name}" if path else name: module for path, module in model.named_modules(remove_duplicate=False)
              for name, _ in module.named_parameters(recurse=False)}  # fmt: skip
    targets: list[Target] = []
    taken: set[int] = set()

    def add(name: str, node: int, role: str, row: int) -> None:
        parameter = parameters[name]
        if id(parameter) not in taken:
            taken.add(id(parameter))
            names = (name, *(other for other in tied[id(parameter)] if other != name))
            embedding = isinstance(owners[name], nn.Embedding)
            targets.append(Target(names, node, tuple(parameter.shape), role, row, embedding))

    for index, node in enumerate(graph.nodes):
        if not node.listed or node.name not in parameters:
            if node.listed and node.name.endswith((".weight", ".bias")):
                raise ConfigError(
                    f"The graph has a node {node.name!r} which is no parameter of {type(model).__name__}; trace this "
                    "very network instead of another one."
                )
            continue
        if (node.is_last_weight or node.is_last_bias) and not predict_class_layers:
            continue
        if parameters[node.name].dim() == 1:
            is_bias = node.name.endswith("bias")
            role = "class_bias" if node.is_last_bias else "vector"
            add(node.name, index, role, BIAS_ROW if is_bias else WEIGHT_ROW)
            bias = node.name.removesuffix("weight") + "bias"
            if node.type_name in NORMS_WITH_BIAS and not is_bias and bias in parameters:
                add(bias, index, "vector", BIAS_ROW)
        else:
            add(node.name, index, _role(node.is_last_weight, tuple(parameters[node.name].shape)), WEIGHT_ROW)
    uncovered = tuple(name for name, parameter in parameters.items() if id(parameter) not in taken)
    config = getattr(model, "config", None)
    return TargetPlan(
        tuple(targets),
        uncovered,
        getattr(config, "initializer_range", None),
        getattr(config, "num_hidden_layers", None),
    )


def _role(is_last_weight: bool, shape: Shape) -> str:
    if len(shape) == 3:
        return "position" if shape[0] == 1 and min(shape[1:]) > 1 else "tensor3"
    if is_last_weight and (len(shape) == 2 or shape[2:] == (1, 1)):
        return "class_weight"
    return "matrix" if len(shape) == 2 else "kernel"


def _names_of_each(named: Iterable[tuple[str, Tensor]]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = defaultdict(list)
    for name, parameter in named:
        found[id(parameter)].append(name)
    return found
