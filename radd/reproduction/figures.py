"""Figures of the reproduction, from the jobs' results."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from common.diffusion.nfe import loglinear_nfe
from common.report import Figure, Theme, draw_figure
from common.report.curves import smoothed
from radd.losses import LOSS_TYPES
from radd.reproduction.sampling import BIASED, ONE_STAGE
from radd.reproduction.settings import BOUND_LIMIT, SIGMAS


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
