"""From the jobs' results to the section: tables, checks against the specification's thresholds, figures.

Dimensions: none; everything here is plain numbers.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import numpy as np
from matplotlib.axes import Axes

from common.diffusion.nfe import loglinear_nfe
from common.report import Check, Figure, Section, Table, Theme, draw_figure
from common.report.curves import smoothed
from radd.losses import LOSS_TYPES
from radd.reproduction.settings import BOUND_LIMIT, SIGMAS, Settings

ONE_STAGE = ("float64", "float32", "float16-compat")
BIASED = ("float32", "float16-compat")  # one-stage draws in these precisions lose rare tokens

TEXT = """
Absorbing discrete diffusion with a network that never sees the time, trained on the help texts inside Python (bytes,
blocks of 64) with four losses that are equal in expectation. A loss estimates an upper bound on the negative
log-likelihood; every trained network is scored by all four. All numbers are nats per byte.

What has to come out: all bounds below 2.65; for each network, the four estimates agree within their Monte-Carlo errors
(after the known correction for the masking levels that the t losses leave out); the mean likelihood over random orders
is the same bound; the sampler calls the network as often as the theory says; and categorical draws in one stage lose
rare tokens in half and single precision, but not in double precision or in two stages.
"""


def joint_deviation(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """Distance of two estimates in joint standard errors, each corrected by its range term."""
    gap = (first["mean"] - first.get("range", 0.0)) - (second["mean"] - second.get("range", 0.0))
    return abs(gap) / math.hypot(first["error"], second["error"])


def bound_checks(scores: Mapping[str, Mapping], suffix: str = "") -> list[Check]:
    """Every cell below the limit; in every row, all pairs of estimators agree."""
    checks = []
    cells = [(row, column, cell) for row, score in scores.items() for column, cell in score["cells"].items()]
    row, column, worst = max(cells, key=lambda item: item[2]["mean"])
    checks.append(
        Check(
            claim=f"every bound is below {BOUND_LIMIT} nats per byte{suffix}",
            measured=f"largest {worst['mean']:.3f} ({row} scored by {column})",
            threshold=f"< {BOUND_LIMIT}",
            passed=worst["mean"] < BOUND_LIMIT,
        )
    )
    for row, score in scores.items():
        pairs = itertools.combinations(score["cells"].items(), 2)
        distance, left, right = max((joint_deviation(a, b), i, j) for (i, a), (j, b) in pairs)
        checks.append(
            Check(
                claim=f"trained with {row}: the four estimators agree{suffix}",
                measured=f"at most {distance:.2f} joint standard errors ({left}, {right})",
                threshold=f"<= {SIGMAS:g}",
                passed=distance <= SIGMAS,
            )
        )
        if "orders" in score:
            over_orders = score["orders"]["random"]
            distance, name = max((joint_deviation(cell, over_orders), name) for name, cell in score["cells"].items())
            checks.append(
                Check(
                    claim=f"trained with {row}: mean NLL over random orders equals the bound{suffix}",
                    measured=f"at most {distance:.2f} joint standard errors ({name})",
                    threshold=f"<= {SIGMAS:g}",
                    passed=distance <= SIGMAS,
                )
            )
    return checks


def calls_check(calls: Mapping, suffix: str = "") -> Check:
    """Measured calls of the sampler against E-NFE, for every number of steps."""
    points = calls["points"]
    distances = [
        (abs(point["measured"] - point["expected"]) / max(point["deviation"], 1e-12), point["steps"])
        # with a deviation of (almost) nothing the count is exact up to rounding of the expectation
        if abs(point["measured"] - point["expected"]) > 1e-6
        else (0.0, point["steps"])
        for point in points
    ]
    worst, steps = max(distances)
    return Check(
        claim=f"network calls per sequence equal E-NFE, {calls['noise']} noise{suffix}",
        measured=f"at most {worst:.2f} standard deviations of the mean (n = {steps})",
        threshold=f"< {SIGMAS:g}",
        passed=worst < SIGMAS,
    )


def precision_checks(shares: Mapping[str, Mapping], suffix: str = "") -> list[Check]:
    """Unbiased modes reproduce the tail share; one-stage draws in low precision fall below it."""
    checks = []
    for mode in ("two-stage", "float64"):
        found = shares[mode]
        distance = abs(found["share"] - found["true_share"]) / found["error"]
        checks.append(
            Check(
                claim=f"{mode} draws keep the share of rare tokens{suffix}",
                measured=f"{found['share']:.4f} of {found['true_share']:.4f}, {distance:.2f} binomial errors off",
                threshold=f"<= {SIGMAS:g}",
                passed=distance <= SIGMAS,
            )
        )
    reference = min(shares["two-stage"]["share"], shares["float64"]["share"], shares["float64"]["true_share"])
    for mode in BIASED:
        found = shares[mode]
        checks.append(
            Check(
                claim=f"one-stage {mode} draws lose rare tokens{suffix}",
                measured=f"{found['share']:.4f}",
                threshold=f"< {reference:.4f} (float64, two-stage, exact)",
                passed=found["share"] < reference,
            )
        )
    return checks


# ---------------------------------------------------------------- tables


def bound_table(scores: Mapping[str, Mapping], curves: Mapping[str, Mapping]) -> Table:
    """Rows: the loss trained with; columns: the estimator."""
    rows = []
    for row, score in scores.items():
        cells = score["cells"]
        values = [f"{cells[name]['mean']:.3f} ± {cells[name]['error']:.3f}" for name in LOSS_TYPES]
        rows.append([row, *values, f"{curves[row]['last']:.2f} / {curves[row]['last_deviation']:.3f}"])
    columns = ["trained with ↓ scored by →", *LOSS_TYPES, "last training loss / its sd per step"]
    caption = (
        "Bound in nats per byte ± Monte-Carlo standard error; the same test sequences and masks for all networks. All "
        "start from the same weights and see the same batches; t_DSE and t_DCE also share gradients, so they coincide."
    )
    return Table(name="bounds", columns=columns, rows=rows, caption=caption)


def estimator_table(scores: Mapping[str, Mapping]) -> Table:
    """One row per network and estimator, with every digit; the bound table's source."""
    rows = []
    for row, score in scores.items():
        for name, cell in score["cells"].items():
            corrected = cell["mean"] - cell["range"]
            rows.append([row, name, cell["mean"], cell["error"], cell["deviation"], cell["range"], corrected])
        if "orders" in score:
            orders = score["orders"]["random"]
            name = f"{orders['count']} random orders"
            rows.append([row, name, orders["mean"], orders["error"], orders["deviation"], 0.0, orders["mean"]])
            for name in ("ar_forward", "ar_backward"):
                rows.append([row, name, score["orders"][name], None, None, 0.0, score["orders"][name]])
    columns = ["trained with", "estimator", "bound", "standard error", "sd of one draw", "range term", "corrected"]
    caption = (
        "sd of one draw: of one network call on one sequence (of a whole order: as many calls as tokens). The t losses "
        "leave out the lowest and highest masking levels, which the range term accounts for."
    )
    return Table(name="estimators", columns=columns, rows=rows, caption=caption)


def calls_table(calls: Mapping) -> Table:
    """Measured calls by number of steps."""
    rows = [
        [p["steps"], p["expected"], p["measured"], p["deviation"], f"{p['least']}–{p['most']}", p["launches"]]
        for p in calls["points"]
    ]
    columns = ["steps n", "E-NFE(n)", "measured calls per row", "sd of the mean", "range over rows", "launches"]
    caption = (
        f"Event-driven sampling of {calls['rows']} sequences, {calls['noise']} noise. A launch evaluates all rows that "
        "still have a step with a change; one call per step would need n launches."
    )
    return Table(name=f"calls-{calls['noise']}", columns=columns, rows=rows, caption=caption)


def precision_table(shares: Mapping[str, Mapping]) -> Table:
    """Tail share and mean surprise by precision of the draws."""
    rows = [
        [mode, found["tokens"], found["share"], found["error"], found["surprise"]] for mode, found in shares.items()
    ]
    first = next(iter(shares.values()))
    rows.append(["exact", None, first["true_share"], None, first["entropy"]])
    columns = ["draws", "tokens", "share of rank >= 1000", "binomial error", "mean -ln p (nats)"]
    caption = (
        "1024 steps on a constant Zipf distribution over 8000 tokens; float64, float32, float16 draw in one stage."
    )
    return Table(name="precision", columns=columns, rows=rows, caption=caption)


def seeds_table(scores: Mapping[int, Mapping[str, Mapping]]) -> Table:
    """Mean and spread over seeds of the bound by the lowest-variance loss."""
    rows = []
    for row in next(iter(scores.values())):
        values = [by_loss[row]["cells"]["k_DCE"]["mean"] for by_loss in scores.values()]
        rows.append([row, len(values), fmean(values), stdev(values), min(values), max(values)])
    columns = ["trained with", "seeds", "mean bound (k_DCE)", "sd over seeds", "least", "most"]
    return Table(name="seeds", columns=columns, rows=rows, caption="Training with any of the losses ends equally.")


def baseline_table(baselines: Mapping[str, float], score: float) -> Table:
    """What simple models reach on the same bytes."""
    rows = [[name, value] for name, value in baselines.items()] + [["RADD, mean of the k_DCE column", score]]
    return Table(name="baselines", columns=["model", "nats per byte"], rows=rows)


# ---------------------------------------------------------------- figures


def loss_figure(curves: Mapping[str, Mapping]) -> Figure:
    """Training and held-out loss by type."""

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        left, right = axes
        lows, highs = [], []
        for index, (name, found) in enumerate(curves.items()):
            colour = theme.colour(index)
            line = smoothed(found["losses"], max(1, len(found["losses"]) // 20))
            left.plot(found["steps"], found["losses"], color=colour, alpha=0.22, linewidth=0.7)
            left.plot(found["steps"], line, color=colour, label=name)
            points = found["validation_steps"], found["validation_bounds"]
            # t_DSE and t_DCE have the same gradients for the same masks: draw the first wide, the second on it.
            right.plot(
                *points, color=colour, label=name, marker="o", markersize=3, linewidth=4.5 if index == 0 else 1.6
            )
            lows.append(min(line[-len(line) // 2 :]))
            highs.append(np.interp(0.06, np.linspace(0, 1, len(line)), line))
        # The first steps start at ln 128 = 4.85; the part that tells the losses apart would be squeezed.
        left.set_ylim(min(lows) - 0.25, max(highs) + 0.3)
        left.set_title("training")
        right.set_title("held out: bound with the same masks for all")
        for ax in axes:
            ax.set_xlabel("optimizer step")
        left.set_ylabel("loss (nats per byte)")
        right.legend(loc="upper right")

    caption = (
        "Loss by type. Left, thin: mean of a few steps; thick: moving average. The losses are equal in expectation and "
        "differ in variance. For the same masks t_DSE and t_DCE have the same gradient, so their networks coincide."
    )
    return draw_figure("loss_by_type", caption, plot, size=(9.0, 3.6), panels=2)


def calls_figure(calls: Mapping, length: int) -> Figure:
    """Measured network calls over the theory's curve."""
    points = calls["points"]

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        (ax,) = axes
        steps = np.geomspace(points[0]["steps"], points[-1]["steps"], 200)
        if calls["noise"] == "loglinear":
            ax.plot(steps, [loglinear_nfe(n, length)[0] for n in steps], color=theme.colour(0), label="E-NFE (theory)")
        else:
            ax.plot([p["steps"] for p in points], [p["expected"] for p in points], color=theme.colour(0), label="E-NFE")
        ax.plot(steps, np.minimum(steps, 2.2 * length), "--", color=theme.colour(5), label="one call per step")
        ax.axhline(length, color=theme.colour(5), linewidth=1, linestyle=":")
        ax.annotate(f"one call per token, {length}", (steps[0], length), xytext=(0, 4), textcoords="offset points")
        ax.errorbar(
            [point["steps"] for point in points],
            [point["measured"] for point in points],
            yerr=[SIGMAS * point["deviation"] for point in points],
            fmt="*",
            markersize=11,
            capsize=3,
            color=theme.colour(1),
            label="measured (bars: 3 sd of the mean)",
        )
        ax.plot(
            [point["steps"] for point in points],
            [point["launches"] for point in points],
            "s",
            markersize=4.5,
            markerfacecolor="none",
            color=theme.colour(2),
            label=f"launches for {calls['rows']} rows",
        )
        ax.set_xscale("log", base=2)
        ax.set_xticks([point["steps"] for point in points], [str(point["steps"]) for point in points])
        ax.set_ylim(0, 1.5 * length)
        ax.set_xlabel("sampling steps n")
        ax.set_ylabel("network calls per sequence")
        ax.legend(loc="lower right")

    caption = (
        f"Network calls against sampling steps, {length} tokens, {calls['noise']} noise: a step that changes nothing "
        "needs no call, so calls never exceed the number of tokens."
    )
    return draw_figure(f"calls-{calls['noise']}", caption, plot, size=(7.2, 4.2))


def bound_figure(scores: Mapping[str, Mapping], baselines: Mapping[str, float]) -> Figure:
    """The bound table with its error bars."""

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        (ax,) = axes
        names = list(scores)
        for index, name in enumerate(LOSS_TYPES):
            cells = [scores[row]["cells"][name] for row in names]
            ax.errorbar(
                np.arange(len(names)) + (index - 1.5) * 0.15,
                [cell["mean"] - cell["range"] for cell in cells],
                yerr=[SIGMAS * cell["error"] for cell in cells],
                fmt="o",
                markersize=5,
                capsize=3,
                color=theme.colour(index),
                label=f"scored by {name}",
            )
        for place, row in enumerate(names):
            if "orders" in scores[row]:
                value = scores[row]["orders"]["random"]["mean"]
                label = "random orders" if row == next(r for r in names if "orders" in scores[r]) else None
                ax.hlines(value, place - 0.35, place + 0.35, color=theme.colour(4), linewidth=1.6, label=label)
        ax.axhline(BOUND_LIMIT, color=theme.colour(5), linestyle="--", linewidth=1)
        right = len(names) - 0.5
        ax.annotate(
            f"limit {BOUND_LIMIT}", (right, BOUND_LIMIT), xytext=(-2, 4), textcoords="offset points", ha="right"
        )
        ax.set_xlim(-0.5, right)
        ax.set_xticks(range(len(names)), [f"trained with\n{name}" for name in names])
        ax.set_ylabel("bound (nats per byte)")
        ax.grid(axis="x", visible=False)
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.35 * (high - low))  # room for the legend
        ax.legend(ncols=3, loc="upper left")

    caption = (
        f"Bounds with 3 standard errors (range term taken off), unigram model: {baselines['unigram']:.3f}. All losses "
        "train the same model, and all estimate the same number."
    )
    return draw_figure("bounds", caption, plot, size=(7.8, 4.2))


def precision_figure(shares: Mapping[str, Mapping]) -> Figure:
    """Share of rare tokens by precision."""

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        (ax,) = axes
        labels = ["two stages\nfloat32", "one stage\nfloat64", "one stage\nfloat32", "one stage\nfloat16"]
        truth = shares["two-stage"]["true_share"]
        for place, mode in enumerate(("two-stage", *ONE_STAGE)):
            found = shares[mode]
            ax.errorbar(
                [place],
                [found["share"]],
                yerr=[found["error"]],
                fmt="o",
                markersize=7,
                capsize=4,
                color=theme.colour(1 if mode in BIASED else 0),
            )
        ax.axhline(truth, color=theme.colour(2), linewidth=1.4)
        ax.annotate("exact", (2.5, truth), xytext=(-14, 4), textcoords="offset points", color=theme.colour(2))
        ax.set_xlim(-0.5, 3.5)
        ax.set_xticks(range(4), labels)
        ax.set_ylabel("share of tokens of rank ≥ 1000")
        ax.grid(axis="x", visible=False)

    caption = (
        "Rare tokens drawn in 1024 steps from a Zipf distribution; bars are 1 binomial error. In single and half "
        "precision 'stay masked' beats every token below about 6e-8 of its weight, so text looks more confident."
    )
    return draw_figure("precision", caption, plot, size=(6.4, 3.6))


# ---------------------------------------------------------------- the section


def with_orders(results: Mapping[str, Mapping], name: str) -> dict:
    """The scores of a network, with those over orders under ``"orders"`` where there are any."""
    score = dict(results[f"score-{name}"])
    if f"orders-{name}" in results:
        score["orders"] = results[f"orders-{name}"]
    return score


def build_section(settings: Settings, seeds: Sequence[int], results: Mapping[str, Mapping], facts: Mapping) -> Section:
    """The section of all seeds; figures and the main tables show the first one.

    Args:
        results: by job name, see ``radd/reproduce.py``.
        facts: provenance and duration.
    """
    scores = {
        seed: {loss: with_orders(results, f"{loss}-seed{seed}") for loss in settings.loss_types} for seed in seeds
    }
    curves = {loss: results[f"train-{loss}-seed{seeds[0]}"] for loss in settings.loss_types}
    baselines = results["baselines"]
    checks: list[Check] = []
    for seed in seeds:
        suffix = f" (seed {seed})" if len(seeds) > 1 else ""
        calls = results[f"calls-loglinear-seed{seed}"]
        shares = {mode: results[f"precision-{mode}-seed{seed}"] for mode in ("two-stage", *ONE_STAGE)}
        checks += [*bound_checks(scores[seed], suffix), calls_check(calls, suffix), *precision_checks(shares, suffix)]
        if seed == seeds[0]:
            first_calls, first_shares = calls, shares
    first = scores[seeds[0]]
    mean_bound = fmean(score["cells"]["k_DCE"]["mean"] for score in first.values())
    tables = [bound_table(first, curves), baseline_table(baselines, mean_bound), calls_table(first_calls)]
    tables += [precision_table(first_shares), estimator_table(first)]
    figures = [loss_figure(curves), bound_figure(first, baselines), calls_figure(first_calls, settings.length)]
    figures.append(precision_figure(first_shares))
    if len(seeds) > 1:
        tables.insert(1, seeds_table(scores))
    for loss in settings.geometric_losses:
        geometric = {f"{loss}, geometric": results[f"score-{loss}-geometric-seed{seeds[0]}"]}
        checks += bound_checks(geometric, " (geometric noise)")
        calls = results[f"calls-geometric-seed{seeds[0]}"]
        checks.append(calls_check(calls))
        tables += [calls_table(calls)]
        figures.append(calls_figure(calls, settings.length))
    sample = first_calls["sample"]
    return Section(
        title="RADD: absorbing discrete diffusion without time",
        text=TEXT,
        checks=checks,
        tables=tables,
        figures=figures,
        facts=dict(facts),
        listings={f"a sample of {settings.length} bytes": sample},
    )
