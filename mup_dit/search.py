"""Random search over base learning rate, clip norm, REPA weight and warm-up, as the paper tuned its MMDiT.

Trial k draws its options from (seed, k) alone, so that a search can be continued with more trials, run in any order and
on any number of machines.

Source: specification 3.6; arXiv 2505.15270, section 5.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from scipy.stats import spearmanr

from common.config import require_at_least
from common.errors import ConfigError, DataError
from common.report import Table
from common.seeding import generator
from mup_dit.sweep import ArmResult

BEST_SHARE = 0.25  # of the trials, whose medians the report shows
BINS = 3  # of a continuous option, each with as many trials


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Ranges of a random search; an empty list leaves the option as it is configured."""

    loglr: tuple[float, ...] = (-11.0, -5.0)  # [least, most] of the log2 base rate, uniform
    grad_clip: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)  # one of
    repa_weight: tuple[float, ...] = ()  # [least, most], log-uniform; with model.repa_depth
    warmup: tuple[float, ...] = (0.0, 0.02, 0.1)  # one of, as shares of the run

    def __post_init__(self) -> None:
        for name in ("loglr", "repa_weight"):
            values = getattr(self, name)
            if values and (len(values) != 2 or not values[0] <= values[1]):
                raise ConfigError(f"search.{name}={list(values)} must be [least, most], or [] to leave the option.")
        if self.repa_weight and not self.repa_weight[0] > 0:
            raise ConfigError(f"search.repa_weight={list(self.repa_weight)} must be positive; it is drawn log-uniform.")
        if any(not value > 0 for value in self.grad_clip):
            raise ConfigError(f"search.grad_clip={list(self.grad_clip)} must be positive norms.")
        if any(not 0 <= value <= 1 for value in self.warmup):
            raise ConfigError(f"search.warmup={list(self.warmup)} are shares of the run; they must lie in [0, 1].")


def draw_trial(search: SearchConfig, seed: int, trial: int) -> dict[str, float]:
    """Options of one trial by name; those that the search leaves alone are missing.

    Raises: ConfigError for a negative trial.
    """
    require_at_least("trial", trial, 0)
    rng = generator(seed, "random search", trial)

    # every option is drawn in every trial, so that leaving one alone does not change the others
    uniform = dict(zip(("loglr", "grad_clip", "repa_weight", "warmup"), torch.rand(4, generator=rng).tolist()))
    found: dict[str, float] = {}
    if search.loglr:
        least, most = search.loglr
        found["loglr"] = round(least + (most - least) * uniform["loglr"], 3)
    if search.repa_weight:
        least, most = (math.log(value) for value in search.repa_weight)
        found["repa_weight"] = float(f"{math.exp(least + (most - least) * uniform['repa_weight']):.4g}")
    for name in ("grad_clip", "warmup"):
        if choices := getattr(search, name):
            found[name] = choices[int(len(choices) * uniform[name])]
    return found


@dataclass(frozen=True)
class SearchReport:
    """What a search found.

    Attributes:
        best: of all trials.
        medians: option -> median over the best quarter of the trials.
        importance: option -> Spearman's rank correlation with the loss, of the option's distance from its best value.
    """

    best: ArmResult
    medians: Mapping[str, float]
    importance: Mapping[str, float]
    tables: tuple[Table, ...]


def options_of(result: ArmResult) -> dict[str, float]:
    """The options that the search drew."""
    return dict(result.settings or {})


def report_search(results: Sequence[ArmResult]) -> SearchReport:
    """Argmin, medians of the best quarter, and the median loss by value of every option.

    Raises: DataError if no trial has a finite loss.
    """
    finite = sorted((result for result in results if math.isfinite(result.loss)), key=lambda result: result.loss)
    if not finite:
        raise DataError(f"none of {len(results)} trials has a finite loss; search smaller rates (search.loglr).")
    best = finite[0]
    good = finite[: max(1, math.ceil(BEST_SHARE * len(results)))]
    names = list(options_of(best))
    medians = {name: median(options_of(result)[name] for result in good) for name in names}
    importance = {name: _importance(results, name, options_of(best)[name]) for name in names}
    rows = [[name, options_of(best)[name], medians[name], importance[name]] for name in names]
    summary = Table(
        name="search",
        columns=["option", "argmin", f"median of the best {len(good)}", "rank correlation"],
        rows=rows,
        caption=f"{len(results)} trials, {len(results) - len(finite)} of them diverged. Rank correlation: of the loss "
        "with the distance from the best value; near 0: the option hardly matters.",
    )
    return SearchReport(best, medians, importance, (summary, _by_value(results, names)))


def _importance(results: Sequence[ArmResult], name: str, best: float) -> float:
    distances = [abs(options_of(result)[name] - best) for result in results]
    if len(set(distances)) < 2 or len(results) < 3:
        return 0.0
    # a diverged run ranks last
    correlation = spearmanr(distances, [min(result.loss, 1e30) for result in results]).statistic
    return float(correlation) if math.isfinite(correlation) else 0.0


def _by_value(results: Sequence[ArmResult], names: Sequence[str]) -> Table:
    """Median and least loss of the trials that share a value, or a third of the range."""
    rows = []
    for name in names:
        values = np.array([options_of(result)[name] for result in results])
        losses = np.array([result.loss for result in results])
        distinct = np.unique(values)
        if len(distinct) <= 2 * BINS:
            groups = [(f"{value:g}", values == value) for value in distinct]
        else:
            places = np.array_split(np.argsort(values, kind="stable"), BINS)
            groups = []
            for place in places:
                chosen = np.zeros(len(values), dtype=bool)
                chosen[place] = True
                groups.append((f"{values[place].min():.4g} to {values[place].max():.4g}", chosen))
        for label, chosen in groups:
            median_loss = float(np.median(losses[chosen]))
            rows.append([name, label, int(chosen.sum()), median_loss, float(losses[chosen].min())])
    columns = ["option", "value", "trials", "median loss", "least loss"]
    return Table(name="search-values", columns=columns, rows=rows, caption="Losses by value of every option.")
