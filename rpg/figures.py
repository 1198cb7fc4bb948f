"""Figures of an evaluation: accuracy against similarity, weight histograms, networks in a plane, tasks.

Dimensions: K networks, V compared values.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from common.report import Figure, Theme, draw_figure
from rpg.candidates import HELD_OUT, INTERPOLATED, MEAN, MEAN_GENERATED, RIDGE, RIDGE_PAIRS, UNSEEN
from rpg.novelty import GENERATED, ORIGINAL
from rpg.similarity import ValueSample
from rpg.task_report import TaskRow

PANELS = 6  # tensors with a histogram
BINS = 60


STYLES = {
    ORIGINAL: (0, "o", True), GENERATED: (1, "^", True), GENERATED + UNSEEN: (3, "^", True), HELD_OUT: (2, "o", False),
    MEAN: (2, "*", True), MEAN_GENERATED: (1, "*", False), INTERPOLATED: (4, "s", True), RIDGE: (4, "s", False),
    RIDGE_PAIRS: (4, "D", False),
}  # fmt: skip
"""Of a group in all figures: colour, marker, whether the marker is filled."""


def _scatter(ax: Axes, theme: Theme, points: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Every group in its style; all noise levels share one."""
    labelled = set()
    # the groups of most interest last, on top
    for group in sorted(points, key=lambda name: (name.startswith(GENERATED), name.startswith("noise"))):
        x, y = zip(*points[group], strict=True)
        base = group.removesuffix(UNSEEN)
        if base.startswith("noise"):
            label, style = "noise", {"color": theme.colour(5), "marker": "x", "alpha": 0.7}
        else:
            colour, marker, filled = STYLES.get(group) or STYLES[base]
            label = group
            style = {"marker": marker, "edgecolors": theme.colour(colour),
                     "facecolors": theme.colour(colour) if filled else "none"}  # fmt: skip
        size = 110 if base in (MEAN, MEAN_GENERATED) else 24
        ax.scatter(x, y, s=size, label=None if label in labelled else label, **style)
        labelled.add(label)
    ax.figure.legend(loc="outside right upper", fontsize=7.5)


def novelty_figure(points: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Accuracy of each network over its largest IoU of errors with an original; group -> (similarity, accuracy)."""

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        (ax,) = axes
        noise = sorted(
            (np.mean([x for x, _ in found]), np.mean([y for _, y in found]))
            for group, found in points.items()
            if group.startswith("noise")
        )
        if len(noise) > 1:
            ax.plot(*zip(*noise, strict=True), color=theme.colour(5), linewidth=1, label="noise, mean of each level")
        ax.set_xlabel("largest IoU of errors with an original")
        ax.set_ylabel("accuracy")
        _scatter(ax, theme, points)

    caption = (
        "Accuracy against similarity of errors to the nearest original (of an original: to another one). A useful "
        "generator lies above the curve of noise-perturbed originals: more accurate at equal similarity."
    )
    return draw_figure("novelty", caption, plot, size=(7.8, 4.4))


def distance_figure(points: Mapping[str, Sequence[tuple[float, float]]], copy_limit: float | None) -> Figure:
    """Accuracy over the distance of weights to the nearest original; group -> (distance, accuracy)."""

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        (ax,) = axes
        if copy_limit is not None:
            ax.axvline(copy_limit, color=theme.colour(5), linestyle="--", linewidth=1, label="copies lie left of this")
        ax.set_xlabel("Euclidean distance to the nearest original")
        ax.set_ylabel("accuracy")
        _scatter(ax, theme, points)

    caption = "Accuracy against distance in weight space. Distance as such is no merit: noise increases it too."
    return draw_figure("distance", caption, plot, size=(7.8, 4.4))


def histogram_figure(sample: ValueSample, originals_KV: Tensor, generated_KV: Tensor) -> Figure:
    """Distribution of the values of the largest tensors, originals against generated networks."""
    sizes = {name: int(np.prod(shape)) for name, shape in sample.shapes.items()}
    chosen = sorted(sizes, key=sizes.get, reverse=True)[:PANELS]
    chosen = [name for name in sizes if name in chosen]  # in the order of the network

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        for ax, name in zip(axes, chosen, strict=True):
            one = sample.unweighted(originals_KV, name).flatten().numpy()
            other = sample.unweighted(generated_KV, name).flatten().numpy()
            # a few far outliers must not flatten the histogram
            low, high = np.quantile(np.concatenate([one, other]), [0.001, 0.999])
            edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
            ax.hist(one, edges, density=True, color=theme.colour(0), alpha=0.45, label=ORIGINAL)
            ax.hist(other, edges, density=True, histtype="step", color=theme.colour(1), linewidth=1.4, label=GENERATED)
            ax.set_title(name if len(name) < 26 else f"...{name[-23:]}", fontsize=8)
            ax.set_yticks([])
        axes[0].legend(fontsize=7)

    caption = "Values of the largest tensors, all networks of a group together."
    return draw_figure("histograms", caption, plot, size=(2.3 * len(chosen) + 0.4, 2.6), panels=len(chosen))


def plane_figure(
    plane: Mapping[str, Tensor], shares: tuple[float, float], runs: Sequence[Sequence[int]] = ()
) -> Figure:
    """All networks in the plane of the first two principal components.

    Args:
        plane, shares: see ``principal_plane``.
        runs: places of originals that one training saved one after another; they are joined by lines.
    """

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        (ax,) = axes
        for places in runs:
            x, y = plane[ORIGINAL][list(places)].T.numpy()
            ax.plot(x, y, color=theme.colour(0), linewidth=0.7, alpha=0.6)
        ax.set_xlabel(f"first principal component ({shares[0]:.0%} of the variance)")
        ax.set_ylabel(f"second ({shares[1]:.0%})")
        _scatter(ax, theme, {group: points_K2.tolist() for group, points_K2 in plane.items()})

    caption = (
        "Networks in weight space. Lines join originals of one training in the order of their files: its trajectory, "
        "where checkpoints follow each other."
    )
    return draw_figure("trajectory", caption, plot, size=(7.8, 4.6))


def task_figure(rows: Sequence[TaskRow]) -> Figure:
    """Accuracy by task over the majority rate, a panel for seen and one for unseen tasks."""
    groups = [name for name in (GENERATED, GENERATED + UNSEEN) if any(row.group == name for row in rows)]

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        for ax, group in zip(axes, groups, strict=True):
            own = [row for row in rows if row.group == group]
            majority = [row.majority for row in own]
            low = min(majority)
            ax.plot([low, 1], [low, 1], "--", color=theme.colour(5), linewidth=1, label="the more frequent answer")
            controls = [(row.majority, row.wrong_task) for row in own if row.wrong_task is not None]
            if controls:
                ax.scatter(
                    *zip(*controls, strict=True), s=14, marker="x", color=theme.colour(5), label="on another task"
                )
            trained = [(row.majority, row.trained) for row in own if row.trained is not None]
            if trained:
                ax.scatter(*zip(*trained, strict=True), s=18, color=theme.colour(0), label="trained")
            ax.scatter(
                majority, [row.accuracy for row in own], s=24, marker="^", color=theme.colour(1), label="generated"
            )
            ax.set_title(f"{'unseen' if group.endswith(UNSEEN) else 'seen'} tasks: {len(own)}")
            ax.set_xlabel("share of the more frequent answer")
        axes[0].set_ylabel("accuracy")
        axes[-1].legend(fontsize=7.5)

    caption = "Accuracy of networks generated for binary tasks; one point per task."
    return draw_figure("tasks", caption, plot, size=(4.2 * len(groups) + 0.6, 3.8), panels=len(groups))
