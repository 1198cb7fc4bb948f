"""Trained nets as a list of runs, and numbers made of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from common.evaluation.metric import Metric, mean_metric
from logah.reproduction import names
from logah.reproduction.settings import Settings


@dataclass(frozen=True)
class Run:
    """One net trained from one start.

    Attributes:
        order: number of the data order.
        points: epochs or steps, beginning with 0.
        scores: accuracy or loss at each of them.
    """

    net: str
    lr: float
    order: int
    points: tuple[int, ...]
    scores: tuple[float, ...]

    def at(self, point: int) -> float:
        """The score at ``point``."""
        return self.scores[self.points.index(point)]

    @property
    def cell(self) -> tuple[str, float, int]:
        """What runs of two starts have in common if they may be compared."""
        return self.net, self.lr, self.order


Runs = list[Run]


def runs_of(settings: Settings, results: Mapping[str, Mapping], start: str, kind: str, seed: int) -> Runs:
    """All runs from one start."""
    return [
        Run(net.label, curve["lr"], order, tuple(curve["points"]), tuple(curve["scores"]))
        for net in settings.nets_of(kind)
        for order in range(settings.orders_of(start, kind))
        for curve in results[names.started(start, kind, net, seed, order)]["curves"]
    ]


def reaching(runs: Iterable[Run], point: int) -> Runs:
    """Those that were scored at ``point``; before training one of those that differ in their learning rate only."""
    reached = [run for run in runs if point in run.points]
    if point == 0:
        return list({(run.net, run.order): run for run in reversed(reached)}.values())[::-1]
    return reached


def mean_at(runs: Iterable[Run], point: int) -> Metric:
    """Mean score and its standard error over runs."""
    return mean_metric("score", [run.at(point) for run in reaching(runs, point)])


def difference_at(runs: Iterable[Run], base: Iterable[Run], point: int) -> Metric:
    """Mean of ``runs - base`` and its standard error, over pairs of the same net, rate and data order."""
    before = {run.cell: run.at(point) for run in reaching(base, point)}
    pairs = [run.at(point) - before[run.cell] for run in reaching(runs, point) if run.cell in before]
    return mean_metric("difference", pairs)


def rates(runs: Iterable[Run]) -> list[float]:
    """Learning rates, ascending."""
    return sorted({run.lr for run in runs})


def by_rate(runs: Iterable[Run], net: str, point: int) -> dict[float, Metric]:
    """Mean score of a net at ``point`` over data orders, for every learning rate."""
    reached = [run for run in reaching(runs, point) if run.net == net]
    return {lr: mean_at([run for run in reached if run.lr == lr], point) for lr in rates(reached)}


def steps_to_reach(run: Run, loss: float) -> float | None:
    """Step at which a run's loss falls to ``loss``, on straight lines between its points; None if it does not."""
    if run.scores[0] <= loss:
        return float(run.points[0])
    for place in range(1, len(run.points)):
        before, after = run.scores[place - 1], run.scores[place]
        if after <= loss < before:
            share = (before - loss) / (before - after)
            return run.points[place - 1] + share * (run.points[place] - run.points[place - 1])
    return None
