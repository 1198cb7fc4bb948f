"""Figures of the reproduction: curves with bands of one standard error."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from common.report import Figure, Theme, draw_figure
from logah.reproduction.runs import Run, mean_at
from logah.reproduction.settings import LANGUAGE, VISION, Arm, Settings

Starts = Mapping[str, Sequence[Run]]


def draw_band(ax: Axes, runs: Sequence[Run], colour: str, label: str, scale: float = 1.0, style: str = "-") -> None:
    """Mean over runs at every point that all of them reach, with a band of one standard error."""
    points = [point for point in runs[0].points if all(point in run.points for run in runs)]
    means = [mean_at(runs, point) for point in points]
    middle = scale * np.array([mean.value for mean in means])
    error = scale * np.array([mean.standard_error or 0.0 for mean in means])
    ax.plot(points, middle, style, marker="o", markersize=3.5, color=colour, label=label)
    ax.fill_between(points, middle - error, middle + error, color=colour, alpha=0.18, linewidth=0)


def vision_figure(settings: Settings, starts: Starts) -> Figure:
    """Accuracy over epochs: a panel per net, and their mean."""

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        panels = [*((net.label, net.label) for net in settings.vision_nets), (None, "mean of the three")]
        panels[-1] = (None, f"mean of {len(settings.vision_nets)} nets")
        for ax, (net, title) in zip(axes, panels, strict=True):
            for index, (label, runs) in enumerate(starts.items()):
                chosen = [run for run in runs if net in (None, run.net)]
                draw_band(ax, chosen, theme.colour(index), label, scale=100)
            ax.set_title(title)
            ax.set_xlabel("epochs")
            ax.set_xticks(range(settings.epochs + 1))
            ax.set_ylim(0, 100)
        axes[0].set_ylabel("accuracy, %")
        axes[-1].legend(fontsize=8, loc="lower right")

    caption = (
        "Accuracy on unseen digits of networks larger than any that the hypernetworks were trained on, by start; mean "
        "over learning rates and data orders with a band of one standard error over these runs."
    )
    return draw_figure("vision", caption, plot, size=(11.0, 3.4), panels=len(settings.vision_nets) + 1)


def zero_shot_figure(settings: Settings, found: Mapping[str, Mapping]) -> Figure:
    """Accuracy of predictions without training, by size."""
    space = settings.vision_space

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        (ax,) = axes
        nets = settings.zero_shot_nets
        width = 0.8 / max(1, len(found))
        for index, (label, result) in enumerate(found.items()):
            places = np.arange(len(nets)) + width * (index - (len(found) - 1) / 2)
            heights = [100 * row["accuracy"] for row in result["rows"]]
            errors = [100 * row["standard_error"] for row in result["rows"]]
            ax.bar(
                places,
                heights,
                width,
                yerr=errors,
                color=theme.colour(index + 1),
                label=label,
                error_kw={"linewidth": 1},
            )
        ax.axhline(10, color=theme.colour(5), linestyle=":", linewidth=1)
        marks = ["" if net.depth <= max(space.depths) and net.width <= max(space.widths) else "*" for net in nets]
        ax.set_xticks(range(len(nets)), [net.label + mark for net, mark in zip(nets, marks, strict=True)])
        ax.set_xlabel("depth x width (*: larger than any net in training)")
        ax.set_ylabel("accuracy, %")
        ax.grid(axis="x", visible=False)
        ax.legend(fontsize=8)

    caption = (
        "Accuracy of predicted networks without any training; the dotted line is chance, bars of error over images. "
        "Depth is extrapolated further than width."
    )
    return draw_figure("zero_shot", caption, plot, size=(8.2, 3.4))


def language_figure(settings: Settings, starts: Starts) -> Figure:
    """Held-out loss over steps: a panel per net, a line per start and learning rate."""
    styles = [":", "--", "-"]

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        for ax, net in zip(axes, settings.language_nets, strict=True):
            for index, (label, runs) in enumerate(starts.items()):
                for place, lr in enumerate(reversed(settings.language_lrs)):
                    chosen = [run for run in runs if run.net == net.label and run.lr == lr]
                    style = styles[-1 - place % len(styles)]
                    draw_band(ax, chosen, theme.colour(index), f"{label}, lr {lr:g}", style=style)
            ax.set_title(net.label)
            ax.set_xlabel("steps")
        axes[0].set_ylabel("nats per token of held-out text")
        axes[-1].legend(fontsize=8)

    caption = (
        "Held-out loss of language models larger than any that the hypernetwork was trained on. Predicted starts are "
        "far ahead early; random starts catch up."
    )
    return draw_figure("language", caption, plot, size=(9.4, 3.8), panels=len(settings.language_nets))


def training_figure(found: Sequence[tuple[Arm, Mapping]]) -> Figure:
    """Training loss of the hypernetworks: of freshly predicted nets."""

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        for ax, kind, title in zip(axes, (VISION, LANGUAGE), ("digits", "text"), strict=True):
            of_kind = [(arm.label, result) for arm, result in found if arm.kind == kind]
            for index, (label, result) in enumerate(of_kind):
                ax.plot(result["steps"], result["losses"], color=theme.colour(index + 1), linewidth=1.2, label=label)
            ax.set_title(title)
            ax.set_xlabel("optimizer step")
            if of_kind:
                ax.legend(fontsize=8)
        axes[0].set_ylabel("training loss, nats")

    caption = (
        "Training loss of the hypernetworks: cross entropy of freshly predicted networks and a small norm penalty."
    )
    return draw_figure("training", caption, plot, size=(9.0, 3.4), panels=2)
