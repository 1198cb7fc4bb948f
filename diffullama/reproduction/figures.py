"""Figures of the reproduction, from the jobs' results."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from common.report import Figure, Theme, draw_figure
from diffullama.reproduction.settings import BOUND_LIMIT, Settings

TRAILING = 20  # points of a training curve that are averaged; 1/t makes single steps jump


def trailing_mean(values: Sequence[float]) -> np.ndarray:
    """Mean of each value and up to ``TRAILING - 1`` before it: no jump at the end, where a centred mean has few."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(sums))
    first = np.maximum(last - TRAILING, 0)
    return (sums[last] - sums[first]) / (last - first)


def curve_figure(settings: Settings, curves: Mapping[str, Mapping]) -> Figure:
    """Held-out bounds over all tokens seen, the parent's included, and training losses over steps."""
    arms = settings.arms()
    tokens = settings.batch_size * settings.length

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        left, right = axes
        for index, arm in enumerate(arms):
            found, colour = curves[arm.name], theme.colour(index)
            before = settings.ar_steps if arm.parent else 0
            seen = (np.array(found["validation_steps"]) + before) * tokens / 1e6
            left.plot(seen, found["validation_bounds"], color=colour, marker="o", markersize=3, label=arm.label)
            right.plot(found["steps"], trailing_mean(found["losses"]), color=colour, label=arm.label)
        left.axhline(BOUND_LIMIT, color=theme.colour(5), linestyle="--", linewidth=1)
        left.annotate(f"limit {BOUND_LIMIT}", (0, BOUND_LIMIT), xytext=(2, 3), textcoords="offset points")
        left.set_xlabel("million tokens seen, the parent's included")
        left.set_ylabel("nats per token, held out")
        left.set_title("bound of held-out text (AR: exact)")
        left.legend()
        right.set_xlabel("optimizer step of the arm")
        right.set_title(f"training loss, mean of the last {TRAILING} points")

    caption = (
        "Left: bound of the same held-out blocks with the same masks; adapt starts where its AR parent stopped. Right: "
        "each arm's own training loss."
    )
    return draw_figure("curves", caption, plot, size=(9.6, 3.8), panels=2)


def infill_figure(settings: Settings, scores: Mapping[str, Mapping]) -> Figure:
    """Single hidden tokens, and what the text after a gap is worth."""
    arms = [arm for arm in settings.arms() if arm.name in scores]

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        left, right = axes
        rows: dict[Axes, dict[int, str]] = {left: {}, right: {}}
        for index, arm in enumerate(arms):
            rows[left][-index] = arm.label
            nll = scores[arm.name]["cloze"]["nll"]
            left.errorbar(
                [nll["mean"]], [-index], xerr=[2 * nll["error"]], fmt="o", capsize=3, color=theme.colour(index)
            )
            if "spans" in scores[arm.name]:
                rows[right][-index] = arm.label
                gain = scores[arm.name]["spans"]["gain"]
                right.errorbar(
                    [gain["mean"]], [-index], xerr=[2 * gain["error"]], fmt="o", capsize=3, color=theme.colour(index)
                )
        right.axvline(0, color=theme.colour(5), linewidth=1)
        for ax in axes:
            ax.set_yticks(list(rows[ax]), list(rows[ax].values()))
            ax.set_ylim(-len(arms) + 0.5, 0.5)
        left.set_xlabel("cross-entropy of a hidden token (nats)")
        right.set_xlabel("gain from the true suffix (nats per token)")

    caption = (
        "Left: one token of a block hidden; the AR parent sees the left context only, the others both sides. Right: "
        f"how much the loss of a hidden span of {settings.span} tokens falls when the text after it is shown. Bars: 2 "
        "standard errors over blocks."
    )
    return draw_figure("infilling", caption, plot, size=(9.6, 0.5 * len(arms) + 1.6), panels=2)
