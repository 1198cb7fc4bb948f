"""What is computed from examined networks: accuracy, novelty, distances, ensembles, classes, tasks, verdict.

Dimensions: K networks of a group, N test samples, V compared values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.evaluation.metric import Metric, mean_metric
from rpg.candidates import INTERPOLATED, MEAN, UNSEEN, noise_group
from rpg.ensembles import Ensemble, compute_ensemble
from rpg.evaluation_config import EvaluateConfig
from rpg.examination import Examined, places_with_predictions
from rpg.novelty import GENERATED, ORIGINAL, GroupSummary, compute_novelty, summarize_accuracy
from rpg.predictions import PredictionCache
from rpg.similarity import (
    Nearest,
    Spacing,
    TensorStatistics,
    ValueSample,
    compute_spacing,
    nearest_originals,
    pairwise_distances,
    principal_plane,
    tensor_statistics,
)
from rpg.task_report import TaskRow, compute_task_rows, judge_tasks, summarize_tasks, task_similarity
from rpg.testing import Tester
from rpg.verdict import Finding, judge

ENSEMBLES_OF = (ORIGINAL, GENERATED, INTERPOLATED)


@dataclass(frozen=True)
class ClassAccuracy:
    """Mean accuracy of a group on the test samples of one original class."""

    group: str
    label: int
    samples: int
    accuracy: Metric


@dataclass
class Analysis:
    """Results by group; lists follow the order of the group's networks, None where something is unknown.

    Attributes:
        similarity: largest intersection over union of errors with an original, by network.
        nearest: nearest original in weight space, by network (of an original: another one).
        iou_KK, iou_names: of all pairs of tested networks; None for task networks and test programs.
        plane, plane_shares: principal components of all networks, and their shares of the variance.
    """

    groups: dict[str, Examined]
    sample: ValueSample
    summaries: dict[str, GroupSummary] = field(default_factory=dict)
    similarity: dict[str, list[float | None]] = field(default_factory=dict)
    iou_KK: Tensor | None = None
    iou_names: tuple[str, ...] = ()
    spacing: Spacing | None = None
    nearest: dict[str, list[Nearest | None]] = field(default_factory=dict)
    tensors: list[TensorStatistics] = field(default_factory=list)
    plane: dict[str, Tensor] = field(default_factory=dict)
    plane_shares: tuple[float, float] = (0.0, 0.0)
    ensembles: list[Ensemble] = field(default_factory=list)
    classes: list[ClassAccuracy] = field(default_factory=list)
    class_names: tuple[str, ...] = ()
    tasks: list[TaskRow] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def has_tasks(self) -> bool:
        return any(network.task is not None for group in self.groups.values() for network in group.networks)

    def generated_groups(self) -> list[str]:
        """Names of the groups of generated networks: one, or seen and unseen tasks."""
        return [name for name in (GENERATED, GENERATED + UNSEEN) if name in self.groups]


def analyse(
    groups: dict[str, Examined],
    sample: ValueSample,
    config: EvaluateConfig,
    tester: Tester,
    cache: PredictionCache,
) -> Analysis:
    """Everything that the options ask for and the networks allow."""
    found = Analysis(groups, sample)
    _compare_answers(found)
    _compare_weights(found)
    if config.ensembles and tester.has_predictions and not found.has_tasks:
        found.ensembles = _ensembles(groups, tester, cache)
    if config.per_class and tester.has_predictions:
        found.classes = class_accuracies(groups, tester.classes_N)
        found.class_names = tuple(tester.class_names or ())
    if found.has_tasks and tester.has_predictions:
        found.tasks = compute_task_rows(groups, tester.classes_N, seed=config.seed)
    found.findings = _judge(found, config)
    return found


def _compare_answers(found: Analysis) -> None:
    groups = found.groups
    found.similarity = {name: [None] * len(group.networks) for name, group in groups.items()}
    places = {name: places_with_predictions(group) for name, group in groups.items()}
    if not any(places.values()):  # a test program tells accuracies only
        for name, group in groups.items():
            if tested := group.tested():
                accuracy_K = torch.tensor([group.accuracy[place] for place in tested], dtype=torch.float64)
                found.summaries[name] = summarize_accuracy(name, accuracy_K)
        return
    if found.has_tasks:
        found.summaries = summarize_tasks(groups)
        found.similarity = task_similarity(groups)
        return
    wrong = {
        name: torch.stack([groups[name].predictions[place].wrong_N for place in members])
        for name, members in places.items()
        if members
    }
    names = {name: [groups[name].names[place] for place in members] for name, members in places.items()}
    novelty = compute_novelty(wrong, original=ORIGINAL, names=names)
    found.summaries, found.iou_KK, found.iou_names = dict(novelty.groups), novelty.iou_KK, novelty.names
    for name, summary in novelty.groups.items():
        if summary.similarity_K is not None:
            for place, value in zip(places[name], summary.similarity_K.tolist(), strict=True):
                found.similarity[name][place] = value


def _compare_weights(found: Analysis) -> None:
    """Distances, tensors and the plane, of networks with finite values."""
    finite = {
        name: [place for place, is_finite in enumerate(group.finite) if is_finite]
        for name, group in found.groups.items()
    }
    finite = {name: places for name, places in finite.items() if places}
    values = {name: found.groups[name].values_KV[places] for name, places in finite.items()}
    found.nearest = {name: [None] * len(group.networks) for name, group in found.groups.items()}
    if len(values) > 1 or sum(map(len, values.values())) > 2:
        found.plane, found.plane_shares = principal_plane(values)
    if ORIGINAL not in values:
        return
    originals = [found.groups[ORIGINAL].names[place] for place in finite[ORIGINAL]]
    found.spacing = compute_spacing(values[ORIGINAL])
    for name, places in finite.items():
        if name == ORIGINAL:
            nearest = _nearest_others(originals, values[ORIGINAL])
        else:
            names = [found.groups[name].names[place] for place in places]
            nearest = nearest_originals(names, values[name], originals, values[ORIGINAL])
        for place, each in zip(places, nearest, strict=True):
            found.nearest[name][place] = each
    generated = [values[name] for name in found.generated_groups() if name in values]
    if generated:
        found.tensors = tensor_statistics(found.sample, values[ORIGINAL], torch.cat(generated))


def _nearest_others(names: Sequence[str], values_KV: Tensor) -> list[Nearest | None]:
    """The same among originals, each with its nearest other one."""
    if len(names) < 2:
        return [None] * len(names)
    distance_KK = pairwise_distances(values_KV, values_KV)
    distance_KK.fill_diagonal_(torch.inf)
    norm_K = torch.linalg.vector_norm(values_KV, dim=1, dtype=torch.float64).clamp(min=1e-30)
    offset_KV = values_KV - values_KV.mean(0)
    length_K = torch.linalg.vector_norm(offset_KV, dim=1, dtype=torch.float64)
    found = []
    for row, name in enumerate(names):
        place = int(distance_KK[row].argmin())
        distance, lengths = float(distance_KK[row, place]), float(length_K[row] * length_K[place])
        product = (float(length_K[row]) ** 2 + float(length_K[place]) ** 2 - distance**2) / 2
        cosine = max(-1.0, min(1.0, product / lengths)) if lengths > 0 else 0.0
        found.append(Nearest(name, names[place], distance, distance / float(norm_K[row]), cosine, float(length_K[row])))
    return found


def _ensembles(groups: Mapping[str, Examined], tester: Tester, cache: PredictionCache) -> list[Ensemble]:
    """Averaged logits of the originals, the generated networks and interpolations: those that could be tested."""
    found = []
    for name in ENSEMBLES_OF:
        if name not in groups:
            continue
        members = [groups[name].networks[place] for place in places_with_predictions(groups[name])]
        ensemble = compute_ensemble(tester, cache, members, name) if len(members) > 1 else None
        if ensemble is not None:
            found.append(ensemble)
    return found


def class_accuracies(groups: Mapping[str, Examined], classes_N: Tensor | None) -> list[ClassAccuracy]:
    """Mean accuracy of every group on every class, with its error over networks.

    Args:
        classes_N: original class of each test sample; None: the right answers are the classes (all networks answer the
            same question then).

    Source: for task networks, the per-class report of the RPG paper's code.
    """
    rows = []
    for name, group in groups.items():
        found = [group.predictions[place] for place in places_with_predictions(group)]
        if not found:
            continue
        label_N = found[0].target_N if classes_N is None else classes_N
        right_KN = torch.stack([~prediction.wrong_N for prediction in found]).double()
        for label in label_N.unique().tolist():
            here_N = label_N == label
            rows.append(
                ClassAccuracy(name, label, int(here_N.sum()), mean_metric("accuracy", right_KN[:, here_N].mean(1)))
            )
    return rows


def _judge(found: Analysis, config: EvaluateConfig) -> list[Finding]:
    if found.spacing is None:
        return judge_tasks(found.tasks)
    findings: list[Finding] = []
    for group in found.generated_groups():
        which = "" if len(found.generated_groups()) == 1 else f"{group}: "
        suffix = UNSEEN if group.endswith(UNSEEN) else ""
        own = judge(
            [each for each in found.nearest[group] if each is not None],
            found.spacing,
            found.summaries,
            original=ORIGINAL,
            generated=group,
            noised=[noise_group(level) for level in config.baselines.noise],
            mean=MEAN + suffix,
        )
        findings += [Finding(which + each.claim, each.measured, each.threshold, each.passed) for each in own]
    return findings + judge_tasks(found.tasks)
