"""Tables of an evaluation, from its analysis."""

from collections.abc import Sequence

from common.report.tables import Cell, Table
from rpg.analysis import Analysis
from rpg.novelty import ORIGINAL
from rpg.similarity import Nearest
from rpg.task_report import group_metric


def _value(metric: object) -> float | None:
    return None if metric is None else metric.value


def _error(metric: object) -> float | None:
    return None if metric is None else metric.standard_error


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def groups_table(found: Analysis) -> Table:
    """One row per group: accuracy, similarity of errors, distance of weights."""
    rows: list[list[Cell]] = []
    for name, group in found.groups.items():
        summary = found.summaries.get(name)
        nearest = [each for each in found.nearest[name] if each is not None]
        rows.append(
            [
                name,
                len(group.networks),
                _value(summary and summary.accuracy),
                _error(summary and summary.accuracy),
                summary and summary.lowest,
                summary and summary.highest,
                _value(summary and summary.within),
                _error(summary and summary.within),
                _value(summary and summary.with_originals),
                _value(summary and summary.similarity),
                _error(summary and summary.similarity),
                _mean([each.distance for each in nearest]),
                min((each.distance for each in nearest), default=None),
            ]
        )
    caption = (
        "Accuracy over networks with standard errors; IoU of errors within the group, with all originals, and with the "
        "nearest original (of an original: another one); Euclidean distance of weights to the nearest original."
    )
    columns = [
        "group", "networks", "accuracy", "s.e.", "min", "max", "IoU within", "s.e. ", "IoU originals", "IoU nearest",
        "s.e.  ", "L2 nearest", "L2 smallest",
    ]  # fmt: skip
    return Table(name="groups", columns=columns, rows=rows, caption=caption)


def networks_table(found: Analysis) -> Table:
    """One row per network."""
    rows: list[list[Cell]] = []
    for name, group in found.groups.items():
        for place, network in enumerate(group.networks):
            nearest = found.nearest[name][place]
            rows.append(
                [
                    name, network.name, network.task, group.accuracy[place], group.loss[place],
                    found.similarity[name][place], *_nearest_cells(nearest), group.finite[place], group.error[place],
                ]
            )  # fmt: skip
    columns = [
        "group", "network", "task", "accuracy", "loss", "IoU nearest", "nearest original", "L2", "L2 over norm",
        "cosine of offsets", "L2 mean original", "finite", "error",
    ]  # fmt: skip
    return Table(name="networks", columns=columns, rows=rows)


def _nearest_cells(nearest: Nearest | None) -> list[Cell]:
    if nearest is None:
        return [None] * 5
    return [nearest.original, nearest.distance, nearest.relative, nearest.cosine, nearest.mean_distance]


def nearest_table(found: Analysis, limit: int = 40) -> Table | None:
    """The generated networks and the originals they are nearest to, nearest first."""
    rows = []
    for name in found.generated_groups():
        for place, network in enumerate(found.groups[name].networks):
            nearest = found.nearest[name][place]
            if nearest is not None:
                limit_of_copies = found.spacing.copy_limit
                is_copy = None if limit_of_copies is None else nearest.distance < limit_of_copies
                rows.append(
                    [
                        network.name, nearest.original, nearest.distance, nearest.relative, nearest.cosine,
                        found.similarity[name][place], found.groups[name].accuracy[place],
                        None if is_copy is None else "copy" if is_copy else "no",
                    ]
                )  # fmt: skip
    if not rows:
        return None
    rows.sort(key=lambda row: row[2])
    exact = "" if found.sample.is_exact else (
        f" Distances are estimates from {found.sample.num_sampled:,} of {found.sample.num_values:,} values."
    )  # fmt: skip
    caption = f"Nearest original of each generated network{f', the first {limit}' if len(rows) > limit else ''}.{exact}"
    columns = [
        "network", "nearest original", "L2", "L2 over norm", "cosine of offsets", "IoU nearest", "accuracy", "copy",
    ]  # fmt: skip
    return Table(name="nearest", columns=columns, rows=rows[:limit], caption=caption)


def findings_table(found: Analysis) -> Table | None:
    """The verdict."""
    if not found.findings:
        return None
    rows = [[each.claim, each.measured, each.threshold, each.passed] for each in found.findings]
    caption = "Are the generated networks copies, and are they better than networks made of the originals?"
    return Table(name="findings", columns=["claim", "measured", "threshold", "result"], rows=rows, caption=caption)


def ensembles_table(found: Analysis) -> Table | None:
    """Averaged logits."""
    if not found.ensembles:
        return None
    rows = [
        [each.name, each.members, found.summaries[each.name].accuracy.value, each.accuracy,
         each.accuracy - found.summaries[each.name].accuracy.value]
        for each in found.ensembles
    ]  # fmt: skip
    columns = ["ensemble of", "members", "mean of members", "mean of logits", "gain"]
    caption = "Ensembles by averaged logits; the groups named 'mean of ...' are averages of weights."
    return Table(name="ensembles", columns=columns, rows=rows, caption=caption)


def classes_table(found: Analysis) -> Table | None:
    """Accuracy by class; a column per group with its error."""
    if not found.classes:
        return None
    groups = list(dict.fromkeys(row.group for row in found.classes))
    labels = sorted({row.label for row in found.classes})
    cells = {(row.group, row.label): row for row in found.classes}
    rows = []
    for label in labels:
        name = found.class_names[label] if label < len(found.class_names) else label
        line: list[Cell] = [name, next(row.samples for row in found.classes if row.label == label)]
        for group in groups:
            row = cells.get((group, label))
            line += [_value(row and row.accuracy), _error(row and row.accuracy)]
        rows.append(line)
    columns = ["class", "samples", *(column for group in groups for column in (group, f"s.e. {group}"))]
    return Table(name="classes", columns=columns, rows=rows, caption="Mean accuracy by class of the test samples.")


def tensors_table(found: Analysis) -> Table | None:
    """Originals and generated networks by tensor."""
    if not found.tensors:
        return None
    rows = [
        [row.name, row.values, row.std, row.generated_std, row.spread, row.generated_spread,
         row.generated_spread / row.spread if row.spread and row.generated_spread is not None else None,
         row.correlation]
        for row in found.tensors
    ]  # fmt: skip
    columns = [
        "tensor", "values", "std", "generated std", "spread", "generated spread", "spread ratio",
        "correlation of means",
    ]  # fmt: skip
    caption = (
        "Deviation of values within a network; spread of a value over networks (a generator with a ratio far below 1 "
        "has collapsed, far above 1 adds noise)."
    )
    return Table(name="tensors", columns=columns, rows=rows, caption=caption)


def tasks_table(found: Analysis) -> Table | None:
    """Task networks by group."""
    if not found.tasks:
        return None
    rows = []
    for group in dict.fromkeys(row.group for row in found.tasks):
        columns = {
            name: group_metric(found.tasks, group, name) for name in ("accuracy", "majority", "wrong_task", "trained")
        }
        own = [row for row in found.tasks if row.group == group]
        rows.append(
            [
                group, len(own), _value(columns["accuracy"]), _error(columns["accuracy"]),
                min(row.accuracy for row in own), _value(columns["majority"]), _value(columns["wrong_task"]),
                _value(columns["trained"]), sum(row.accuracy > row.majority for row in own) / len(own),
            ]
        )  # fmt: skip
    names = [
        "group", "tasks", "accuracy", "s.e.", "min", "more frequent answer", "on another task", "trained",
        "share above more frequent",
    ]  # fmt: skip
    caption = "Networks for binary tasks; means and errors over tasks."
    return Table(name="tasks", columns=names, rows=rows, caption=caption)


def task_rows_table(found: Analysis) -> Table | None:
    """One row per group and task."""
    if not found.tasks:
        return None
    rows = [
        [row.group, row.task, row.networks, row.accuracy, row.majority, row.wrong_task, row.trained]
        for row in found.tasks
    ]
    columns = ["group", "task", "networks", "accuracy", "more frequent answer", "on another task", "trained"]
    return Table(name="by_task", columns=columns, rows=rows)


def spacing_facts(found: Analysis) -> dict[str, str]:
    """How far the originals lie apart, for the page."""
    if found.spacing is None or found.spacing.neighbour is None:
        return {}
    return {
        f"distance of an {ORIGINAL} to the nearest other (median)": f"{found.spacing.neighbour:.5g}",
        "mean distance of two originals": f"{found.spacing.pair:.5g}",
    }
