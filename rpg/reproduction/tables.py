"""Tables of the reproduction, from the jobs' results."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from common.report import Table
from rpg.reproduction.checks import measured
from rpg.reproduction.tasks import SEEN, UNSEEN
from rpg.tasks import HELD_OUT_TASKS

Scores = Mapping[str, Sequence]
GROUP_COLUMNS = [
    "networks", "how many", "evaluations", "accuracy", "min", "max", "largest IoU with an original",
    "distance to nearest original", "apart", "seconds each",
]  # fmt: skip


def group_row(label: str, scores: Scores, evaluations: int | None = None) -> list:
    """A line of ``group_table``."""
    accuracy = scores["accuracy"]
    return [
        label, len(accuracy), evaluations, measured(accuracy), f"{min(accuracy):.3f}", f"{max(accuracy):.3f}",
        measured(scores["similarity"]), measured(scores["distance"]), scores["apart"],
        scores.get("seconds"),
    ]  # fmt: skip


def group_table(
    name: str,
    drawn: Iterable[tuple[str, int, Scores]],
    baselines: Mapping[str, Scores],
    *,
    caption: str,
) -> Table:
    """Generated networks by sampler or generator, then what they are compared with.

    Args:
        drawn: (label, evaluations, scores).
    """
    rows = [group_row(label, scores, evaluations) for label, evaluations, scores in drawn]
    rows += [group_row(label, scores) for label, scores in baselines.items()]
    return Table(name=name, columns=GROUP_COLUMNS, rows=rows, caption=caption, digits=3)


def task_table(
    drawn: Mapping[str, Mapping[str, Scores]], baselines: Mapping[str, Mapping[str, Sequence[float]]]
) -> Table:
    """Accuracy on seen and unseen tasks by generator, then the baselines."""

    def row(label: str, seen: Sequence[float], unseen: Sequence[float], tasks: Sequence[int]) -> list:
        published = [value for value, task in zip(unseen, tasks, strict=True) if task in HELD_OUT_TASKS]
        return [label, measured(seen), measured(unseen), f"{min(unseen):.3f}", measured(published or unseen)]

    rows = []
    for label, found in drawn.items():
        tasks = found[UNSEEN]["tasks"]
        rows.append(row(f"RPG, {label}", found[SEEN]["accuracy"], found[UNSEEN]["accuracy"], tasks))
    first = next(iter(drawn.values()))
    other = [first[name]["other_task"] for name in (SEEN, UNSEEN)]
    rows.append(row(f"RPG, {next(iter(drawn))}, scored on another task", *other, first[UNSEEN]["tasks"]))
    for label, found in baselines.items():
        rows.append(row(label, found[SEEN], found[UNSEEN], first[UNSEEN]["tasks"]))
    columns = ["networks", "seen tasks", "unseen tasks", "worst unseen", "the 20 held-out tasks of the paper"]
    caption = (
        "Accuracy ± standard error over tasks, one network per task. Unseen tasks have no network among those that "
        "generators and regressions learned from; the regression with products of bits is a strong baseline."
    )
    return Table(name="tasks", columns=columns, rows=rows, caption=caption)


def distance_table(found: Mapping[str, Scores]) -> Table:
    """Whether networks for unseen tasks are copies of seen ones."""
    rows = []
    for label, key in (
        ("generated to the nearest training network", "to_nearest_original"),
        ("generated to the trained network of the same task", "to_trained"),
        ("trained network to the nearest training network of another task", "trained_to_nearest_original"),
    ):
        rows.append([label, measured(found[UNSEEN][key])])
    caption = (
        "Euclidean distances over all 3202 values for unseen tasks: generated networks keep the distance from the "
        "training networks that trained ones of the same tasks keep, so they are no copies of seen ones."
    )
    return Table(name="task_distances", columns=["distance", "mean over unseen tasks"], rows=rows, caption=caption)


def collection_table(collected: Mapping[str, Mapping]) -> Table:
    """The checkpoints that the generators learn from."""
    rows = []
    for label, found in collected.items():
        accuracy = found["accuracy"]
        row = [label, len(accuracy), f"{fmean(accuracy):.4f}", f"{min(accuracy):.3f}", f"{max(accuracy):.3f}"]
        rows.append([*row, found.get("consecutive"), found.get("pair"), found.get("apart")])
    columns = ["collection", "checkpoints", "accuracy", "min", "max", "one step apart", "pairs", "trainings apart"]
    caption = "Checkpoints and Euclidean distances: of consecutive steps, of all pairs of a training, of trainings."
    return Table(name="collections", columns=columns, rows=rows, caption=caption, digits=3)


def seeds_table(accuracies: Mapping[str, Sequence[float]]) -> Table:
    """Mean accuracies of several generators that differ in their seed.

    Args:
        accuracies: label -> mean accuracy of each seed's networks.
    """
    rows = []
    for label, means in accuracies.items():
        rows.append([label, len(means), measured(means), f"{min(means):.4f}", f"{max(means):.4f}"])
    columns = ["networks", "generators", "accuracy", "least", "most"]
    caption = "Mean over generators trained with different seeds ± standard error over the generators."
    return Table(name="seeds", columns=columns, rows=rows, caption=caption)
