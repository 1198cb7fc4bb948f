"""Figures of the reproduction, from the jobs' results."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.axes import Axes

from common.evaluation.metric import mean_metric
from common.report import Figure, Theme, draw_figure
from rpg.reproduction.scoring import INTERPOLATED, MEAN, ORIGINALS
from rpg.reproduction.tasks import SEEN, UNSEEN

Scores = Mapping[str, Sequence]


def similarity_figure(baselines: Mapping[str, Scores], drawn: Mapping[str, Scores]) -> Figure:
    """Accuracy of every network over its likeness with the most similar original.

    Args:
        drawn: by label; the first ones are shown.
    """

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        (ax,) = axes
        for index, (label, scores) in enumerate(list(drawn.items())[:3]):
            ax.scatter(scores["similarity"], scores["accuracy"], s=22, color=theme.colour(index), label=label, zorder=3)
        noised = [name for name in baselines if name.startswith("originals + noise")]
        for name in noised:
            ax.scatter(
                baselines[name]["similarity"], baselines[name]["accuracy"], s=12, marker="x", linewidth=1,
                color=theme.colour(5), label="originals + noise" if name == noised[0] else None,
            )  # fmt: skip
        ax.plot(
            [fmean(baselines[name]["similarity"]) for name in noised],
            [fmean(baselines[name]["accuracy"]) for name in noised],
            color=theme.colour(5), linewidth=1.2, label="their means, by noise level",
        )  # fmt: skip
        for place, (name, marker) in enumerate(((ORIGINALS, "."), (INTERPOLATED, "+"), (MEAN, "D"))):
            scores = baselines[name]
            ax.scatter(
                scores["similarity"], scores["accuracy"], s=26, marker=marker, color=theme.colour(3 + place % 2),
                label=name, zorder=2,
            )  # fmt: skip
        ax.set_xlabel("IoU of errors with the most similar original")
        ax.set_ylabel("accuracy on 1000 test digits")
        lows = [min(scores["accuracy"]) for scores in [*baselines.values(), *list(drawn.values())[:1]]]
        ax.set_ylim(bottom=min(lows) - 0.005)
        ax.legend(fontsize=8)

    caption = (
        "Every dot is a network. Useful and new ones lie upper left of the line: more accurate than trained networks "
        "that were perturbed until they differ as much. Of originals: the similarity with another one."
    )
    return draw_figure("similarity", caption, plot, size=(7.2, 4.2))


def sampler_figure(points: Sequence[tuple[str, int, Scores]], level: float) -> Figure:
    """Accuracy of generated networks over evaluations of the denoiser.

    Args:
        points: (label, evaluations, scores).
        level: mean accuracy of the originals.
    """

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        (ax,) = axes
        ax.axhline(level, color=theme.colour(5), linestyle="--", linewidth=1)
        ax.annotate(
            f"originals {level:.3f}", (1, level), xycoords=("axes fraction", "data"), xytext=(-4, -11),
            textcoords="offset points", ha="right",
        )  # fmt: skip
        for index, (label, evaluations, scores) in enumerate(points):
            mean = mean_metric("accuracy", scores["accuracy"])
            accuracies = scores["accuracy"]
            colour = theme.colour(index)
            ax.vlines(evaluations, min(accuracies), max(accuracies), color=colour, linewidth=1, alpha=0.6)
            ax.errorbar(
                [evaluations], [mean.value], yerr=[mean.standard_error or 0.0], fmt="o", capsize=4, color=colour,
                label=label,
            )  # fmt: skip
        ax.set_xscale("log")
        ax.set_xticks(sorted({evaluations for _, evaluations, _ in points}), minor=False)
        ax.set_xticklabels([str(value) for value in sorted({evaluations for _, evaluations, _ in points})])
        ax.minorticks_off()
        ax.set_xlabel("evaluations of the denoiser per token")
        ax.set_ylabel("accuracy of generated networks")
        ax.legend(fontsize=8, loc="lower right")

    caption = (
        "The same generator, different samplers: mean with standard error, and the range over networks. Fresh noise in "
        "every step matters more than the number of steps."
    )
    return draw_figure("samplers", caption, plot, size=(7.2, 3.8))


def state_figure(groups: Mapping[str, Sequence[float]]) -> Figure:
    """Accuracies of single networks by group: with several trainings in one folder."""

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        (ax,) = axes
        for index, accuracies in enumerate(groups.values()):
            count = len(accuracies)
            places = [index + 0.5 * (place / max(1, count - 1) - 0.5) for place in range(count)]
            ax.plot(places, accuracies, "o", markersize=3.5, color=theme.colour(index))
        ax.set_xticks(range(len(groups)), [label.replace(", ", ",\n") for label in groups])
        ax.axhline(0.1, color=theme.colour(5), linestyle=":", linewidth=1)
        ax.set_ylim(0, 1.02)
        ax.set_ylabel("accuracy")
        ax.grid(axis="x", visible=False)

    caption = (
        "Several independent trainings in one folder; every dot is a network, the dotted line is chance. "
        "The state tells the generator which training a network belongs to; averages over trainings are useless."
    )
    return draw_figure("states", caption, plot, size=(max(6.4, 1.7 * len(groups)), 3.8))


def task_figure(drawn: Mapping[str, Scores], trained: Mapping[str, Sequence[float]]) -> Figure:
    """Accuracy of generated task networks, ordered, seen and unseen, with what is reached by training."""

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        for ax, name in zip(axes, (SEEN, UNSEEN), strict=True):
            scores = drawn[name]
            order = sorted(range(len(scores["tasks"])), key=lambda index: scores["accuracy"][index])
            for label, values, marker, colour in (
                ("trained for the task", trained[name], "_", 1),
                ("generated", scores["accuracy"], "o", 0),
                ("more frequent answer", scores["majority"], "_", 5),
                ("generated, scored on another task", scores["other_task"], "x", 3),
            ):
                ax.plot(
                    range(len(order)), [values[index] for index in order], marker, markersize=4,
                    color=theme.colour(colour), label=label,
                )  # fmt: skip
            ax.set_title(f"{name} tasks")
            ax.set_xlabel("tasks by accuracy of the generated network")
        axes[0].set_ylabel("accuracy")
        axes[1].legend(fontsize=8, loc="lower right")

    caption = (
        "One generated network per task, from the ten bits that say which digits are positive. Unseen tasks have no "
        "network among those that the generator learned from."
    )
    return draw_figure("tasks", caption, plot, size=(9.0, 3.8), panels=2)


def loss_figure(curves: Mapping[str, Mapping]) -> Figure:
    """Training loss by generator."""

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        (ax,) = axes
        for index, (label, found) in enumerate(curves.items()):
            ax.plot(found["steps"], found["losses"], color=theme.colour(index), linewidth=1.2, label=label)
        ax.set_yscale("log")
        ax.set_xlabel("optimizer step")
        ax.set_ylabel("mean squared error of the noise")
        ax.legend(fontsize=8)

    caption = (
        "Training loss. Without permutation states it stays high: tokens of several trainings cannot be told apart."
    )
    return draw_figure("training", caption, plot, size=(7.2, 3.6))
