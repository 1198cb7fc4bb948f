"""The reproduction's thresholds: what must come out, judged from the jobs' results."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch

from common.evaluation.metric import Metric, mean_metric
from common.report import Check
from rpg.novelty import GroupSummary
from rpg.reproduction.scoring import MEAN, ORIGINALS, noise_name
from rpg.reproduction.settings import (
    ABOVE_MAJORITY,
    ACCURACY_LOSS,
    COPY_STEPS,
    EVALUATIONS_RATIO,
    MEAN_NETWORK_LIMIT,
    NO_STATE_LIMIT,
    SIGMAS,
    STATES_LOSS,
    UNSEEN_ACCURACY,
    WORST_LOSS,
    WRONG_TASK_LIMIT,
    Draw,
    Settings,
)
from rpg.reproduction.tasks import UNSEEN
from rpg.verdict import compare_with_noise

Scores = Mapping[str, Sequence]  # of one group: accuracy, similarity, distance, a number per network


def measured(values: Sequence[float]) -> str:
    """``0.9656 ± 0.0008``: mean and standard error over networks."""
    return shown(mean_metric("mean", values))


def shown(metric: Metric) -> str:
    """Value and standard error."""
    form = ".4f" if abs(metric.value) < 1e3 else ".3g"  # an untrained generator's distances are huge
    error = "" if metric.standard_error is None else f" ± {metric.standard_error:{form}}"
    return f"{metric.value:{form}}{error}"


def summary_of(name: str, scores: Scores) -> GroupSummary:
    """A group's scores as the novelty report summarises them."""
    accuracy_G, similarity_G = (torch.tensor(scores[key], dtype=torch.float64) for key in ("accuracy", "similarity"))
    return GroupSummary(
        name=name,
        accuracy_K=accuracy_G,
        accuracy=mean_metric("accuracy", accuracy_G),
        within=None,
        with_originals=None,
        similarity_K=similarity_G,
        similarity=mean_metric("similarity", similarity_G),
    )


def quality_checks(drawn: Scores, originals: Scores, label: str, suffix: str = "") -> list[Check]:
    """Generated networks are as good as trained ones, on average and at worst."""
    least = fmean(originals["accuracy"]) - ACCURACY_LOSS
    worst = min(originals["accuracy"]) - WORST_LOSS
    return [
        Check(
            claim=f"generated networks are as accurate as trained ones, {label}{suffix}",
            measured=measured(drawn["accuracy"]),
            threshold=f">= {least:.4f} (originals' mean - {ACCURACY_LOSS:g})",
            passed=fmean(drawn["accuracy"]) >= least,
        ),
        Check(
            claim=f"every generated network works, {label}{suffix}",
            measured=f"worst {min(drawn['accuracy']):.3f}",
            threshold=f">= {worst:.3f} (worst original - {WORST_LOSS:g})",
            passed=min(drawn["accuracy"]) >= worst,
        ),
    ]


def novelty_checks(
    settings: Settings, drawn: Scores, baselines: Mapping[str, Scores], consecutive: float, suffix: str = ""
) -> list[Check]:
    """Generated networks are no copies, and better than noise of equal similarity.

    Args:
        consecutive: distance of neighbouring checkpoints.
    """
    limit = COPY_STEPS * consecutive
    noise = noise_name(min(settings.noise_levels))
    noise_similarity = fmean(baselines[noise]["similarity"])
    checks = [
        Check(
            claim=f"no generated network is a copy of an original{suffix}",
            measured=f"smallest distance {min(drawn['distance']):.3f}",
            threshold=f">= {limit:.3f} ({COPY_STEPS:g} steps of training)",
            passed=min(drawn["distance"]) >= limit,
        ),
        Check(
            claim=f"generated networks differ from one another{suffix}",
            measured=f"mean distance of a pair {drawn['apart']:.3f}",
            threshold=f">= {limit:.3f} ({COPY_STEPS:g} steps of training)",
            passed=drawn["apart"] >= limit,
        ),
        Check(
            claim=f"errors differ from any original's more than those of perturbed originals{suffix}",
            measured=f"mean of the largest IoU {measured(drawn['similarity'])}",
            threshold=f"< {noise_similarity:.4f} ({noise})",
            passed=fmean(drawn["similarity"]) < noise_similarity,
        ),
    ]
    levels = [summary_of(name, baselines[name]) for name in map(noise_name, settings.noise_levels)]
    compared = compare_with_noise(summary_of("generated", drawn), levels)
    error = "" if compared.standard_error is None else f" ± {compared.standard_error:.4f}"
    checks.append(
        Check(
            claim=f"more accurate than perturbed originals of equal similarity{suffix}",
            measured=f"{compared.difference:+.4f}{error} above {compared.noise_accuracy:.4f}",
            threshold="> 0",
            passed=compared.difference > 0,
        )
    )
    return checks


def evaluations_check(few: Draw, many: Draw, results: Mapping[str, Scores], suffix: str = "") -> Check:
    """Few-step sampling is as accurate as the full chain, with a fraction of its evaluations."""
    first, second = (mean_metric("accuracy", results[draw.name]["accuracy"]) for draw in (few, many))
    slack = SIGMAS * math.hypot(first.standard_error or 0.0, second.standard_error or 0.0)
    ratio = many.steps / few.steps
    return Check(
        claim=f"{few.label}: as accurate as {many.label} with a fraction of its evaluations{suffix}",
        measured=f"{shown(first)} against {shown(second)}, {ratio:g} times fewer",
        threshold=f">= -{SIGMAS:g} joint errors ({slack:.4f}); >= {EVALUATIONS_RATIO} times",
        passed=first.value >= second.value - slack and ratio >= EVALUATIONS_RATIO,
    )


def state_checks(
    with_states: Scores, without: Scores, baselines: Mapping[str, Scores], suffix: str = ""
) -> list[Check]:
    """With several trainings, permutation states decide whether anything works; averaging does not."""
    least = fmean(baselines[ORIGINALS]["accuracy"]) - STATES_LOSS
    mean = baselines[MEAN]["accuracy"][0]
    return [
        Check(
            claim=f"several trainings: with a permutation state each, generated networks work{suffix}",
            measured=measured(with_states["accuracy"]),
            threshold=f">= {least:.4f} (originals' mean - {STATES_LOSS:g})",
            passed=fmean(with_states["accuracy"]) >= least,
        ),
        Check(
            claim=f"several trainings: without states they do not{suffix}",
            measured=measured(without["accuracy"]),
            threshold=f"<= {NO_STATE_LIMIT:g}",
            passed=fmean(without["accuracy"]) <= NO_STATE_LIMIT,
        ),
        Check(
            claim=f"several trainings: the mean network does not either{suffix}",
            measured=f"{mean:.3f}",
            threshold=f"<= {MEAN_NETWORK_LIMIT:g}",
            passed=mean <= MEAN_NETWORK_LIMIT,
        ),
    ]


def task_checks(drawn: Mapping[str, Scores], suffix: str = "") -> list[Check]:
    """Networks for tasks that no training network solved: they work, and because of the condition."""
    unseen = drawn[UNSEEN]
    above = [accuracy > majority for accuracy, majority in zip(unseen["accuracy"], unseen["majority"], strict=True)]
    return [
        Check(
            claim=f"networks for unseen tasks work{suffix}",
            measured=f"{measured(unseen['accuracy'])}, worst {min(unseen['accuracy']):.3f}",
            threshold=f"mean >= {UNSEEN_ACCURACY:g}",
            passed=fmean(unseen["accuracy"]) >= UNSEEN_ACCURACY,
        ),
        Check(
            claim=f"they are better than always giving the more frequent answer{suffix}",
            measured=f"{sum(above)} of {len(above)} unseen tasks",
            threshold=f">= {100 * ABOVE_MAJORITY:g} %",
            passed=fmean(above) >= ABOVE_MAJORITY,
        ),
        Check(
            claim=f"it is the condition that does it: scored on another unseen task they fail{suffix}",
            measured=measured(unseen["other_task"]),
            threshold=f"<= {WRONG_TASK_LIMIT:g}",
            passed=fmean(unseen["other_task"]) <= WRONG_TASK_LIMIT,
        ),
    ]
