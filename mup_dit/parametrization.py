"""muP as plain numbers: one row per parameter, computed from the shapes of two narrow models.

An axis whose size differs between the base and the delta model is a *width axis*. The number of width axes decides the
type of a tensor, and the ratio of its size to the base size decides how init, learning rate and forward pass scale.
The numbers are Python floats on the module, so that deepcopy, EMA, DDP, FSDP2, DeepSpeed, torch.compile and safetensors
keep them; the mup package keeps them as attributes of parameters, which the first five lose.

Source: specification 3.5; abc table of arXiv 2505.15270, section 2; the mup package is the oracle of the tests.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import ConfigError

BaseShapes = Mapping[str, tuple[int | None, ...]]
"""Parameter name -> base size of each axis; None: the axis does not grow with width."""

INPUT, HIDDEN, OUTPUT, VECTOR, FINITE, FROZEN = "input", "hidden", "output", "vector", "finite", "frozen"


@dataclass(frozen=True)
class Init:
    """How a tensor begins: ``normal`` or ``uniform`` of standard deviation ``std``, ``zeros``, ``ones``, ``fixed``."""

    law: Literal["normal", "uniform", "zeros", "ones", "fixed"]
    std: float = 0.0

    @property
    def bound(self) -> float:
        """Largest absolute value of the uniform law."""
        return math.sqrt(3.0) * self.std


@dataclass(frozen=True)
class Scaling:
    """One row of the table.

    Attributes:
        base_shape: size of each width axis at base width, None for the others.
        ninf: number of width axes.
        width_mult: m, size over base size of the last width axis; 1 without one.
        kind: input, hidden, output, vector (one axis), finite (no width axis) or frozen.
        lr_mult: factor on the learning rate: 1/m for hidden.
        weight_decay_mult: factor on the weight decay: m for hidden, so that the decay per step keeps its size.
        forward_mult: factor on the input of the layer: output_mult/m for output.
    """

    name: str
    shape: tuple[int, ...]
    base_shape: tuple[int | None, ...]
    ninf: int
    width_mult: float
    kind: str
    init: Init
    lr_mult: float
    weight_decay_mult: float
    forward_mult: float


class Readout(nn.Linear):
    """Linear map from width to a size that does not grow: ``W (mult * h) + b`` with ``mult = output_mult / m``.

    Under the standard parametrisation ``mult`` is 1 and this is an ordinary linear map.
    """

    def __init__(self, in_features: int, out_features: int, output_mult: float = 1.0) -> None:
        super().__init__(in_features, out_features)
        self.output_mult, self.mult = output_mult, 1.0

    def forward(self, h: Tensor) -> Tensor:
        # on the input and not on the product, whose rounding would differ from the reference
        return nn.functional.linear(h if self.mult == 1.0 else h * self.mult, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mult={self.mult:g}"


InitLaw = Callable[[str, tuple[int, ...], tuple[int | None, ...], float], Init]
"""(name, shape, base shape, width multiplier) -> how the parameter begins; every model class brings its own."""


def find_base_shapes(base: nn.Module, delta: nn.Module) -> dict[str, tuple[int | None, ...]]:
    """The width axes of all parameters, and their sizes in ``base``: the axes in which ``delta`` differs.

    Raises: ConfigError if the two have other parameters or numbers of axes.
    """
    shapes = {name: tuple(p.shape) for name, p in base.named_parameters()}
    wider = {name: tuple(p.shape) for name, p in delta.named_parameters()}
    require_same_names(shapes, wider, "the base model", "the delta model")
    return {
        name: tuple(size if size != other else None for size, other in zip(shape, wider[name], strict=True))
        for name, shape in shapes.items()
    }


def require_same_names(first: Mapping, second: Mapping, first_name: str, second_name: str) -> None:
    """Raises ConfigError unless both have the same keys, naming some that are missing on either side."""
    if first.keys() == second.keys():
        return
    missing = [f"{first_name} lacks {sorted(second.keys() - first.keys())[:3]}"] if second.keys() - first.keys() else []
    if first.keys() - second.keys():
        missing.append(f"{second_name} lacks {sorted(first.keys() - second.keys())[:3]}")
    raise ConfigError(
        f"the parameters do not match: {'; '.join(missing)}. Base shapes belong to one depth and one kind of model."
    )


def scaling_table(
    model: nn.Module, base_shapes: BaseShapes | None, init_law: InitLaw, *, scale_updates: bool = True
) -> tuple[Scaling, ...]:
    """One row per parameter, in the order of ``model.named_parameters()``; ``model`` may be on the meta device.

    Args:
        base_shapes: None: no axis is a width axis, all multipliers are 1 (the standard parametrisation).
        init_law: of the model's class.
        scale_updates: False: init as muP has it, every other multiplier 1 (the control "muP init with plain AdamW").

    Raises: ConfigError if base shapes are of another model, or an ordinary linear layer maps width to a fixed size.
    """
    parameters = dict(model.named_parameters())
    if base_shapes is not None:
        require_same_names(parameters, base_shapes, "the model", "the base shapes")
    owners = {
        f"{path}.{name}" if path else name: module
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    rows = []
    for name, parameter in parameters.items():
        shape = tuple(parameter.shape)
        base = (None,) * len(shape) if base_shapes is None else tuple(base_shapes[name])
        _check_axes(name, shape, base)
        ninf, width_mult = width_of(shape, base)
        kind = _kind(name, parameter, owners[name], base, ninf)
        updates = width_mult if ninf == 2 and scale_updates else 1.0
        forward = 1.0
        if kind == OUTPUT or (base_shapes is None and _is_readout_weight(owners[name], name)):
            forward = owners[name].output_mult / (width_mult if scale_updates else 1.0)
        rows.append(
            Scaling(
                name=name,
                shape=shape,
                base_shape=base,
                ninf=ninf,
                width_mult=width_mult,
                kind=kind,
                init=init_law(name, shape, base, width_mult),
                lr_mult=1.0 / updates,
                weight_decay_mult=updates,
                forward_mult=forward,
            )
        )
    return tuple(rows)


def width_of(shape: tuple[int, ...], base_shape: tuple[int | None, ...]) -> tuple[int, float]:
    """Number of width axes, and size over base size of the last one (1 if there is none)."""
    ratios = [size / base for size, base in zip(shape, base_shape, strict=True) if base is not None]
    return len(ratios), ratios[-1] if ratios else 1.0


def _check_axes(name: str, shape: tuple[int, ...], base: tuple[int | None, ...]) -> None:
    if len(shape) != len(base):
        raise ConfigError(f"base shapes of {name}: {len(base)} axes, but the model's tensor has shape {shape}.")
    if sum(size is not None for size in base) > 2:
        raise ConfigError(f"base shapes of {name}: {base} has more than two width axes; muP knows at most two.")


def _is_readout_weight(owner: nn.Module, name: str) -> bool:
    return isinstance(owner, Readout) and name.endswith("weight")


def _kind(name: str, parameter: nn.Parameter, owner: nn.Module, base: tuple[int | None, ...], ninf: int) -> str:
    if not parameter.requires_grad:
        return FROZEN
    if ninf == 2:
        if isinstance(owner, Readout):
            raise ConfigError(f"{name} grows in both axes, but its layer is a Readout; use an ordinary linear layer.")
        return HIDDEN
    if ninf == 0:
        return FINITE
    if parameter.ndim == 1:
        return VECTOR
    if isinstance(owner, nn.Linear) and base[0] is None:  # the width is the fan-in
        if not isinstance(owner, Readout):
            raise ConfigError(
                f"{name} maps the width to a size that does not grow, but its layer is an ordinary linear one; muP "
                "needs a Readout (mup_dit.parametrization) there."
            )
        return OUTPUT
    return INPUT


def apply_table(model: nn.Module, table: tuple[Scaling, ...]) -> None:
    """Sets every readout's multiplier and keeps the table as ``model.scalings``; weights stay as they are.

    Raises: ConfigError if the model already has a table: a second one would be applied to the wrong numbers.
    """
    if getattr(model, "scalings", None) is not None:
        raise ConfigError("the model is parametrised already; build a new one.")
    modules = dict(model.named_modules())
    for row in table:
        path, _, leaf = row.name.rpartition(".")
        if leaf == "weight" and isinstance(modules[path], Readout):
            modules[path].mult = row.forward_mult
    model.scalings = {row.name: row for row in table}


@torch.no_grad()
def initialize(model: nn.Module, table: tuple[Scaling, ...], generator: torch.Generator | None = None) -> None:
    """Draws every parameter by its row, in order, in place; ``fixed`` ones are computed by ``model.reset_tables()``.

    Args:
        generator: None: torch's global one.
    """
    parameters = dict(model.named_parameters())
    model.reset_tables(generator)
    for row in table:
        weight = parameters[row.name]
        if row.init.law == "normal":
            weight.normal_(0.0, row.init.std, generator=generator)
        elif row.init.law == "uniform":
            weight.uniform_(-row.init.bound, row.init.bound, generator=generator)
        elif row.init.law == "zeros":
            weight.zero_()
        elif row.init.law == "ones":
            weight.fill_(1.0)


def fold(model: nn.Module) -> nn.Module:
    """Moves every readout's multiplier into its weight, in place: the result is an ordinary network, equal outputs.

    ``W_plain = W * output_mult / m`` (specification 3.7). Without a table it cannot be trained by muP.
    """
    for module in model.modules():
        if isinstance(module, Readout):
            with torch.no_grad():
                module.weight.mul_(module.mult)
            module.mult = 1.0
    model.scalings = None
    return model


def plain_table(table: Mapping[str, Scaling] | tuple[Scaling, ...]) -> list[dict]:
    """The table as JSON can hold it, for config.json."""
    rows = table.values() if isinstance(table, Mapping) else table
    return [
        {
            "name": row.name,
            "shape": list(row.shape),
            "base_shape": list(row.base_shape),
            "ninf": row.ninf,
            "width_mult": row.width_mult,
            "kind": row.kind,
            "init": row.init.law,
            "init_std": row.init.std,
            "lr_mult": row.lr_mult,
            "weight_decay_mult": row.weight_decay_mult,
            "forward_mult": row.forward_mult,
        }
        for row in rows
    ]
