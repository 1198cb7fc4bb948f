"""Evaluation of networks that were generated for binary tasks: accuracy by task, controls, errors against originals.

Networks of different tasks have different right answers, so errors are compared between networks of one task only.
Two controls say whether the condition matters: always giving the more frequent answer, and each network's accuracy on
another task of its group (a generator that ignores the condition does as well there).

Dimensions: K networks, N test samples.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.evaluation.metric import Metric, mean_metric
from common.seeding import generator
from rpg.candidates import HELD_OUT, UNSEEN
from rpg.examination import Examined, places_with_predictions
from rpg.novelty import GENERATED, ORIGINAL, GroupSummary, compute_novelty, summarize_accuracy
from rpg.predictions import Prediction
from rpg.tasks import task_targets
from rpg.verdict import Finding

MAJORITY_SHARE, WRONG_TASK_LIMIT = 0.95, 0.60


@dataclass(frozen=True)
class TaskRow:
    """One task of one group.

    Attributes:
        majority: accuracy of always giving the more frequent answer.
        wrong_task: mean accuracy of the group's networks for this task on another task; None if it is not known.
        trained: mean accuracy of the originals or held-out networks of this task; None if there is none.
    """

    group: str
    task: int
    networks: int
    accuracy: float
    majority: float
    wrong_task: float | None
    trained: float | None


def majority_of(prediction: Prediction) -> float:
    """Share of the more frequent right answer."""
    positive = float(prediction.target_N.double().mean())
    return max(positive, 1 - positive)


def compute_task_rows(groups: Mapping[str, Examined], classes_N: Tensor | None, *, seed: int) -> list[TaskRow]:
    """A row per group of generated networks or baselines and task, by group, then task.

    Args:
        classes_N: original class of each test sample, which the wrong-task control needs.
    """
    trained: dict[int, list[float]] = defaultdict(list)
    for name, group in groups.items():
        if name == ORIGINAL or name.startswith(HELD_OUT):
            for place in places_with_predictions(group):
                trained[group.networks[place].task].append(group.predictions[place].accuracy)
    rows = []
    for name, group in groups.items():
        places = places_with_predictions(group)
        by_task: dict[int, list[int]] = defaultdict(list)
        for place in places:
            if group.networks[place].task is not None:
                by_task[group.networks[place].task].append(place)
        others = another_task(sorted(by_task), seed)
        for task, members in sorted(by_task.items()):
            found = [group.predictions[place] for place in members]
            control = None
            if classes_N is not None and task in others:
                target_N = task_targets(classes_N, others[task])
                control = _mean([float((each.predicted_N == target_N).double().mean()) for each in found])
            rows.append(
                TaskRow(
                    group=name,
                    task=task,
                    networks=len(members),
                    accuracy=_mean([each.accuracy for each in found]),
                    majority=majority_of(found[0]),
                    wrong_task=control,
                    trained=_mean(trained[task]) if trained.get(task) else None,
                )
            )
    return rows


def another_task(tasks: Sequence[int], seed: int) -> dict[int, int]:
    """For every task a different one of the list: the next in a random circle; empty for fewer than two."""
    if len(tasks) < 2:
        return {}
    order = torch.randperm(len(tasks), generator=generator(seed, "another_task")).tolist()
    return {tasks[place]: tasks[following] for place, following in zip(order, order[1:] + order[:1], strict=True)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def summarize_tasks(groups: Mapping[str, Examined]) -> dict[str, GroupSummary]:
    """Summaries in which a network is compared with originals of its own task only.

    ``similarity`` covers the networks whose task has originals; ``within`` and ``with_originals`` do not exist here.
    """
    similarity = task_similarity(groups)
    summaries = {}
    for name, group in groups.items():
        places = places_with_predictions(group)
        if not places:
            continue
        values = [similarity[name][place] for place in places if similarity[name][place] is not None]
        summaries[name] = summarize_accuracy(
            name,
            torch.tensor([group.predictions[place].accuracy for place in places], dtype=torch.float64),
            similarity_K=torch.tensor(values, dtype=torch.float64) if values else None,
        )
    return summaries


def task_similarity(groups: Mapping[str, Examined]) -> dict[str, list[float | None]]:
    """Per group and network: the largest IoU of errors with an original (another one) of its task; None without any."""
    found: dict[str, list[float | None]] = {name: [None] * len(group.networks) for name, group in groups.items()}
    tasks = {network.task for network in groups[ORIGINAL].networks} if ORIGINAL in groups else set()
    for task in tasks - {None}:
        places = {
            name: [place for place in places_with_predictions(group) if group.networks[place].task == task]
            for name, group in groups.items()
        }
        wrong = {
            name: torch.stack([groups[name].predictions[place].wrong_N for place in members])
            for name, members in places.items()
            if members
        }
        if ORIGINAL not in wrong:
            continue
        for name, summary in compute_novelty(wrong).groups.items():
            if summary.similarity_K is not None:
                for place, value in zip(places[name], summary.similarity_K.tolist(), strict=True):
                    found[name][place] = value
    return found


def judge_tasks(rows: Sequence[TaskRow]) -> list[Finding]:
    """Findings on the generated networks: better than the majority answer, and only on their own task."""
    findings = []
    for group in (GENERATED, GENERATED + UNSEEN):
        own = [row for row in rows if row.group == group]
        if not own:
            continue
        known = any(row.group == ORIGINAL for row in rows)  # without originals nobody knows what was seen
        which = "" if not known else " (unseen tasks)" if group != GENERATED else " (seen tasks)"
        above = sum(row.accuracy > row.majority for row in own)
        findings.append(
            Finding(
                f"more accurate than always the more frequent answer{which}",
                f"{above} of {len(own)} tasks",
                f">= {MAJORITY_SHARE:.0%} of the tasks",
                above >= MAJORITY_SHARE * len(own),
            )
        )
        controls = [row.wrong_task for row in own if row.wrong_task is not None]
        if controls:
            control, accuracy = _mean(controls), _mean([row.accuracy for row in own])
            findings.append(
                Finding(
                    f"networks solve their own task, not others{which}",
                    f"accuracy {control:.4f} on another task, {accuracy:.4f} on their own",
                    f"<= {WRONG_TASK_LIMIT} on another task, more on their own",
                    control <= WRONG_TASK_LIMIT and accuracy > control,
                )
            )
    return findings


def group_metric(rows: Sequence[TaskRow], group: str, name: str) -> Metric | None:
    """Mean of a column over the tasks of a group with its error over tasks; None if no task has it."""
    values = [getattr(row, name) for row in rows if row.group == group and getattr(row, name) is not None]
    return mean_metric(name, values) if values else None
