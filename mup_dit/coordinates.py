"""Coordinate check: do activations keep their size while the width grows? Under muP they do, step for step.

Every module's output is recorded at every step of a short training on one fixed batch, at several widths. The slope of
log2(mean absolute value) against log2(width) is 0 for a network whose parametrisation is right.

Dimensions: n rows, d channels of an output.

Source: specification 4.5; Yang et al., 2022 (Tensor Programs V), appendix D.1.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

LEAST_ACTIVATION = 1e-6  # smaller ones are zeros (a readout at its init) and have no slope
SLOPE_LIMIT = 0.25


def rows_of(x: Tensor) -> Tensor:
    """``(n, d)``: all positions as rows."""
    return x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x[None]


def _covariance(x: Tensor) -> Tensor:
    rows_nd = rows_of(x)
    return rows_nd @ rows_nd.T / rows_nd.shape[1]


def _off_diagonal(x: Tensor) -> Tensor:
    gram_nn = _covariance(x)
    return gram_nn[~torch.eye(len(gram_nn), dtype=torch.bool, device=x.device)]


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": lambda x: x.abs().mean(),
    "l2": lambda x: x.square().mean().sqrt(),
    "mean": lambda x: x.mean(),
    "covl1": lambda x: _covariance(x).abs().mean(),
    "covl2": lambda x: _covariance(x).square().mean().sqrt(),
    "covoffdiagl1": lambda x: _off_diagonal(x).abs().mean(),
    "covoffdiagl2": lambda x: _off_diagonal(x).square().mean().sqrt(),
}


@contextlib.contextmanager
def recording(model: nn.Module, statistics: Sequence[str] = ("l1",)) -> Iterator[list[dict]]:
    """Inside, every call of ``model`` adds one record per module, in order of completion: ``{"module", "l1", ...}``.

    Outputs that are tuples give one record each, with the suffix ``:out[i]``; the model itself is called ``""``.
    """
    records: list[dict] = []

    def hook_for(name: str) -> Callable:
        @torch.no_grad()
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            outputs = output if isinstance(output, tuple | list) else [output]
            for index, value in enumerate(outputs):
                if isinstance(value, Tensor) and value.is_floating_point():
                    suffix = f":out[{index}]" if isinstance(output, tuple | list) else ""
                    found = {key: float(STATISTICS[key](value.detach().float())) for key in statistics}
                    records.append({"module": name + suffix, **found})

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules()]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Coordinate:
    """One module's output at one step (from 1), width and seed."""

    seed: int
    width: int
    step: int
    module: str
    l1: float


StepFunction = Callable[[], None]
"""Runs one optimizer step; the forward pass inside it is recorded."""


def coordinates(
    prepare: Callable[[int, int], tuple[nn.Module, StepFunction]],
    widths: Mapping[int, int],
    *,
    steps: int,
    seeds: Sequence[int],
    progress: Callable[[], None] = lambda: None,
) -> list[Coordinate]:
    """Trains every width for ``steps`` steps with every seed, and records all activations.

    Args:
        prepare: (heads, seed) -> a fresh model and the function that trains it by one step.
        widths: heads -> width.
    """
    found = []
    for seed, (heads, width) in product(seeds, widths.items()):
        model, step = prepare(heads, seed)
        for index in range(1, steps + 1):
            with recording(model) as records:
                step()
            found += [Coordinate(seed, width, index, record["module"], record["l1"]) for record in records]
        progress()
    return found


@dataclass(frozen=True)
class Slope:
    """Growth of one module's activation with width at one step: ``l1 ~ width^slope``."""

    module: str
    step: int
    slope: float


def mean_sizes(found: Sequence[Coordinate]) -> dict[tuple[str, int], dict[int, float]]:
    """(module, step) -> width -> mean over seeds."""
    sums: dict[tuple[str, int], dict[int, list[float]]] = {}
    for item in found:
        sums.setdefault((item.module, item.step), {}).setdefault(item.width, []).append(item.l1)
    return {
        key: {width: math.fsum(values) / len(values) for width, values in sorted(by_width.items())}
        for key, by_width in sums.items()
    }


def slopes(found: Sequence[Coordinate]) -> list[Slope]:
    """Least-squares slope of log2(mean over seeds) against log2(width), where the output is not zero at any width.

    A value that is not finite gives an infinite slope: a diverged network has not passed.
    """
    result = []
    for (module, step), sizes in mean_sizes(found).items():
        values = np.array(list(sizes.values()))
        if not np.isfinite(values).all():
            result.append(Slope(module, step, math.inf))
        elif (values > LEAST_ACTIVATION).all() and len(values) > 1:
            fit = np.polyfit(np.log2(list(sizes)), np.log2(values), 1)
            result.append(Slope(module, step, float(fit[0])))
    return result


@dataclass(frozen=True)
class Verdict:
    """Whether all slopes stay within the limit, and the steepest one."""

    passed: bool
    limit: float
    steepest: Slope | None

    def as_dict(self) -> dict:
        return asdict(self)


def judge(found: Sequence[Coordinate], limit: float = SLOPE_LIMIT) -> Verdict:
    """Pass if every module's slope, the output's included, is within ``limit`` at every step.

    Nothing measurable is no pass.
    """
    measured = slopes(found)
    steepest = max(measured, key=lambda slope: abs(slope.slope), default=None)
    return Verdict(steepest is not None and abs(steepest.slope) <= limit, limit, steepest)
