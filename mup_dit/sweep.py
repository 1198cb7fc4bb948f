"""Learning-rate x width sweeps: what every run gave, where the optimum lies at each width, and whether it transfers.

Learning rates are base-2 logarithms ("loglr"), as in the paper: 2^loglr is the base rate. A run that diverged has an
infinite loss. With common random numbers (same data order, times and noise for every rate) rates are compared pairwise,
so that differences well below the noise of a single loss can be seen.

Source: specification 9.4, 10; arXiv 2505.15270, section 4.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean

import numpy as np

from common.errors import ConfigError, DataError

EDGE_FACTOR = 1.3  # a rate is beyond the edge of divergence if its loss exceeds this times the width's best
ARGMIN_SPREAD = 1.0  # octaves that the best rate on the grid may move over the widths
VERTEX_SPREAD = 0.6  # octaves, of the fitted best rate
EDGE_SPREAD = 1.0  # octaves
REGRET_LIMIT = 0.03  # relative loss at the widest network of taking the narrowest one's rate

Row = Mapping[float, float]
"""loglr -> loss of one width."""


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One run of a sweep.

    Attributes:
        loss: held-out loss after the last step; infinite if the run diverged or was stopped because it did.
        steps: optimizer steps that ran; fewer than ``planned_steps`` if it was stopped.
        curve: (step, training loss) at the logged steps, None where it was not finite.
        parameters: trainable ones.
        settings: other options that vary, e.g. of a random search.
    """

    width: int
    loglr: float
    seed: int
    loss: float
    steps: int
    planned_steps: int
    batch_size: int
    parameters: int
    curve: tuple[tuple[int, float | None], ...] = ()
    settings: Mapping[str, float] | None = None
    stopped: str | None = None  # why it ended early

    def as_dict(self) -> dict:
        """As JSON can hold it: no infinities."""
        values = asdict(self)
        return {**values, "loss": self.loss if math.isfinite(self.loss) else None}

    @classmethod
    def from_dict(cls, values: Mapping) -> "ArmResult":
        """The inverse, also of what JSON made of it."""
        known = {field.name for field in fields(cls)}
        loss = values["loss"]
        curve = tuple((int(step), value) for step, value in values["curve"])
        given = {name: value for name, value in values.items() if name in known}
        return cls(**{**given, "loss": math.inf if loss is None else float(loss), "curve": curve})


def rows_of(results: Iterable[ArmResult]) -> dict[int, dict[float, float]]:
    """Width -> loglr -> mean loss over seeds; both ascending."""
    found: dict[int, dict[float, list[float]]] = {}
    for result in results:
        found.setdefault(result.width, {}).setdefault(result.loglr, []).append(result.loss)
    return {
        width: {rate: fmean(losses) if all(map(math.isfinite, losses)) else math.inf for rate, losses in row}
        for width, row in ((width, sorted(found[width].items())) for width in sorted(found))
    }


# ---------------------------------------------------------------- one width


@dataclass(frozen=True)
class Optimum:
    """Where the loss of one width is least.

    Attributes:
        loglr: best of the grid.
        loss: there.
        vertex: of the parabola through the best point and its neighbours; ``loglr`` at an end of the grid.
        edge: largest loglr whose loss is within ``EDGE_FACTOR`` of the best.
        at_end: the best is the smallest or largest rate tried, so the true one may lie outside.
        capped: the edge is the largest rate tried, so the true one may lie beyond.
    """

    loglr: float
    loss: float
    vertex: float
    edge: float
    at_end: bool
    capped: bool


def find_optimum(row: Row) -> Optimum:
    """The optimum of one width.

    Raises: DataError if no run of it has a finite loss.
    """
    rates = sorted(row)
    best = min(rates, key=lambda rate: (row[rate], rate))
    if not math.isfinite(row[best]):
        raise DataError(
            f"every run of the rates 2^{rates[0]:g} to 2^{rates[-1]:g} diverged; sweep smaller ones, for example "
            f"mup.loglr={rates[0] - 3:g},{rates[0] - 2:g},{rates[0] - 1:g}."
        )
    edge = divergence_edge(row)
    return Optimum(best, row[best], vertex(row), edge, best in (rates[0], rates[-1]), edge == rates[-1])


def vertex(row: Row) -> float:
    """Minimum of the parabola through log(loss) at the best rate and its two neighbours; the best rate at an end.

    Logarithms, because a diverging neighbour would pull the fit away from the optimum. It lies between the neighbours.
    """
    rates = sorted(rate for rate in row if math.isfinite(row[rate]))
    index = rates.index(min(rates, key=lambda rate: (row[rate], rate)))
    if index in (0, len(rates) - 1):
        return rates[index]
    x = np.array(rates[index - 1 : index + 2])
    curvature, slope, _ = np.polyfit(x - x[1], np.log([row[rate] for rate in x]), 2)
    if curvature <= 0:  # equal losses
        return rates[index]
    return float(np.clip(x[1] - slope / (2 * curvature), x[0], x[2]))


def divergence_edge(row: Row, factor: float = EDGE_FACTOR) -> float:
    """Largest rate with a loss of at most ``factor`` times the least."""
    least = min(row.values())
    return max(rate for rate, loss in row.items() if math.isfinite(loss) and loss <= factor * least)


# ---------------------------------------------------------------- all widths


@dataclass(frozen=True)
class Transfer:
    """How optima move with width.

    Attributes:
        optima: width -> optimum, narrow to wide.
        argmin_spread, vertex_spread, edge_spread: largest minus smallest, in octaves.
        edge_drop: edge of the narrowest minus edge of the widest; positive: it falls with width.
        regret: loss of the widest at the narrowest one's best rate over its least loss, minus 1; None if not run.
    """

    optima: Mapping[int, Optimum]
    argmin_spread: float
    vertex_spread: float
    edge_spread: float
    edge_drop: float
    regret: float | None

    @property
    def holds(self) -> bool:
        """Whether a rate tuned at the narrowest width may be used at the widest: argmin, edge and regret agree."""
        small = self.argmin_spread <= ARGMIN_SPREAD and self.edge_spread <= EDGE_SPREAD
        return small and self.regret is not None and self.regret <= REGRET_LIMIT


def find_transfer(rows: Mapping[int, Row]) -> Transfer:
    """Compares the optima of all widths.

    Raises: DataError if there is no width, or one of them has no finite loss.
    """
    if not rows:
        raise DataError("the sweep holds no finished run; start it first.")
    optima = {width: find_optimum(rows[width]) for width in sorted(rows)}
    narrow, wide = min(rows), max(rows)
    at_transferred = rows[wide].get(optima[narrow].loglr)
    regret = None if at_transferred is None else at_transferred / optima[wide].loss - 1
    return Transfer(
        optima,
        argmin_spread=spread(optimum.loglr for optimum in optima.values()),
        vertex_spread=spread(optimum.vertex for optimum in optima.values()),
        edge_spread=spread(optimum.edge for optimum in optima.values()),
        edge_drop=optima[narrow].edge - optima[wide].edge,
        regret=regret,
    )


def spread(values: Iterable[float]) -> float:
    """Largest minus smallest."""
    values = list(values)
    return max(values) - min(values)


# ---------------------------------------------------------------- cost


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """What a run costs: parameters x samples per step x steps. Source: specification 3.6."""

    parameters: int
    batch_size: int
    steps: int

    @property
    def cost(self) -> float:
        return float(self.parameters) * self.batch_size * self.steps


def tuning_cost(runs: int, proxy: RunSize, target: RunSize) -> float:
    """``R S_p B_p T_p / (S_t B_t T_t)``: R proxy runs as a share of the target run."""
    if not target.cost:
        raise ConfigError("the target run costs nothing; give target.heads, target.batch_size and target.n_iters.")
    return runs * proxy.cost / target.cost


def measured_cost(results: Iterable[ArmResult], target: RunSize) -> float:
    """Cost of the steps that really ran, as a share of the target run; stopped runs count up to where they stopped."""
    sizes = (RunSize(parameters=r.parameters, batch_size=r.batch_size, steps=r.steps) for r in results)
    return sum(tuning_cost(1, size, target) for size in sizes)


# ---------------------------------------------------------------- runs that have diverged


def exceeds(own: Mapping[int, float], others: Sequence[Mapping[int, float]], *, factor: float, patience: int) -> bool:
    """Whether the last ``patience`` points of ``own`` all exceed ``factor`` times the best of ``others`` at their step.

    Args:
        own, others: step -> training loss. A step that no other has logged is no evidence.
    """
    last = sorted(own)[-patience:]
    if len(last) < patience:
        return False
    for step in last:
        seen = [other[step] for other in others if math.isfinite(other.get(step, math.inf))]
        if math.isfinite(own[step]) and (not seen or own[step] <= factor * min(seen)):
            return False
    return True


def stopped_at(
    curves: Mapping[float, Mapping[int, float]], *, factor: float, patience: int, first_step: int
) -> dict[float, int]:
    """loglr -> step at which early stopping would have ended the run, for complete curves of one width."""
    found = {}
    for rate, curve in curves.items():
        others = [other for key, other in curves.items() if key != rate]
        for step in sorted(curve):
            past = {s: value for s, value in curve.items() if s <= step}
            if step >= first_step and exceeds(past, others, factor=factor, patience=patience):
                found[rate] = step
                break
    return found


# ---------------------------------------------------------------- files


def to_json(results: Iterable[ArmResult], more: Mapping) -> str:
    """All results and what they mean."""
    return json.dumps({**more, "runs": [result.as_dict() for result in results]}, indent=1, sort_keys=True)


def to_csv(results: Sequence[ArmResult]) -> str:
    """One line a run; the loss of a diverged one is empty."""
    varied = sorted({name for result in results for name in result.settings or {}})
    columns = ["width", "loglr", "seed", "loss", "steps", "planned_steps", "batch_size", "parameters", "stopped"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*columns, *varied])
    for result in results:
        values = result.as_dict()
        cells = [values[name] for name in columns] + [(result.settings or {}).get(name) for name in varied]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return buffer.getvalue()
