"""Are the generated networks copies? A verdict in sentences, from weights, errors and baselines.

Four questions, each answered by a number and a threshold: do the networks differ from one another (a generator of one
good network is none); does any lie as near to an original as originals' neighbours do (weights); do they err on the
same samples as an original (behaviour); are they more accurate than noise-perturbed originals of the same similarity,
and than the mean of all originals (usefulness)?

Source: the novelty study of the RPG paper; the baselines of Zeng et al. 2025, "Generative modeling of weights:
generalization or memorization?".
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.evaluation.metric import Metric
from rpg.novelty import GroupSummary
from rpg.similarity import Nearest, Spacing


@dataclass(frozen=True)
class Finding:
    """One question: ``passed`` speaks for networks that are no copies; None where it cannot be answered."""

    claim: str
    measured: str
    threshold: str
    passed: bool | None


@dataclass(frozen=True)
class NoiseComparison:
    """Accuracy of the generated networks minus that of noise-perturbed originals with the same similarity.

    Attributes:
        side: 0 if the similarity lies among those of the noise levels; -1 below, 1 above all of them, where the nearest
            level is taken.
    """

    difference: float
    standard_error: float | None
    noise_accuracy: float
    side: int


def compare_with_noise(generated: GroupSummary, noised: Sequence[GroupSummary]) -> NoiseComparison | None:
    """Reads the noise curve (accuracy over IoU with the nearest original) at the generated networks' similarity.

    None without generated similarity or noise levels. The error adds those of both groups; that of the similarity, by
    which the curve is read, is left out.
    """
    curve = sorted(
        (each.similarity.value, each.accuracy.value, each.accuracy.standard_error)
        for each in noised
        if each.similarity is not None
    )
    if generated.similarity is None or not curve:
        return None
    place = generated.similarity.value
    side = int(place > curve[-1][0]) - int(place < curve[0][0])
    accuracy, error = _read(curve, min(max(place, curve[0][0]), curve[-1][0]))
    own = generated.accuracy.standard_error
    combined = None if own is None or error is None else math.hypot(own, error)
    return NoiseComparison(generated.accuracy.value - accuracy, combined, accuracy, side)


def _read(curve: Sequence[tuple[float, float, float | None]], place: float) -> tuple[float, float | None]:
    """Linear interpolation of accuracy and error."""
    for (x0, y0, e0), (x1, y1, e1) in zip(curve, curve[1:]):
        if x0 <= place <= x1 and x1 > x0:
            weight = (place - x0) / (x1 - x0)
            errors = None if e0 is None or e1 is None else (1 - weight) * e0 + weight * e1
            return (1 - weight) * y0 + weight * y1, errors
    nearest = min(curve, key=lambda point: abs(point[0] - place))
    return nearest[1], nearest[2]


def judge(
    nearest: Sequence[Nearest],
    spacing: Spacing,
    groups: Mapping[str, GroupSummary],
    *,
    original: str,
    generated: str,
    noised: Sequence[str] = (),
    mean: str | None = None,
) -> list[Finding]:
    """Findings on one group of generated networks; empty lists where nothing can be said."""
    findings = [_weights(nearest, spacing)] if nearest else []
    if generated not in groups:
        return findings
    summary = groups[generated]
    if summary.within is not None:
        findings.append(_diversity(summary, groups[original]))
    if summary.similarity is not None:
        findings.append(_behaviour(summary, groups[original]))
    compared = compare_with_noise(summary, [groups[name] for name in noised if name in groups])
    if compared is not None:
        findings.append(_against_noise(compared))
    if mean in groups:
        findings.append(_against(summary.accuracy, groups[mean].accuracy, "at least as accurate as the mean original"))
    if original in groups:
        findings.append(_against(summary.accuracy, groups[original].accuracy, "at least as accurate as the originals"))
    return findings


def _weights(nearest: Sequence[Nearest], spacing: Spacing) -> Finding:
    limit = spacing.copy_limit
    closest = min(nearest, key=lambda each: each.distance)
    claim = "no network is a copy of an original (distance of weights)"
    measured = f"smallest distance {closest.distance:.4g} ({closest.name} to {closest.original})"
    if limit is None:
        return Finding(claim, measured, "two originals are needed to judge", None)
    copies = sum(each.distance < limit for each in nearest)
    threshold = f">= {limit:.4g}; originals: nearest {spacing.neighbour:.4g}, mean pair {spacing.pair:.4g}"
    return Finding(claim, f"{measured}; {copies} of {len(nearest)} below the limit", threshold, copies == 0)


def _diversity(generated: GroupSummary, originals: GroupSummary) -> Finding:
    """A generator that always draws the same network passes every other test with ease."""
    claim = "generated networks differ from one another more than an original from its nearest other one"
    measured = f"IoU within {generated.within.value:.3f}"
    if originals.similarity is None:
        return Finding(claim, measured, "two originals are needed to judge", None)
    threshold = f"< {originals.similarity.value:.3f}"
    return Finding(claim, measured, threshold, generated.within.value < originals.similarity.value)


def _behaviour(generated: GroupSummary, originals: GroupSummary) -> Finding:
    claim = "errors differ from those of the nearest original more than originals' errors differ"
    measured = f"IoU {generated.similarity.value:.3f}"
    if originals.similarity is None:
        return Finding(claim, measured, "two originals are needed to judge", None)
    threshold = f"< {originals.similarity.value:.3f} (originals with their nearest other one)"
    return Finding(claim, measured, threshold, generated.similarity.value < originals.similarity.value)


def _against_noise(compared: NoiseComparison) -> Finding:
    error = "" if compared.standard_error is None else f" +- {compared.standard_error:.4f}"
    note = {0: "", -1: ", less similar than any of them", 1: ", more similar than any of them"}[compared.side]
    slack = 2 * (compared.standard_error or 0.0)
    passed: bool | None = compared.difference > 0
    if abs(compared.difference) <= slack:
        passed = None
    # less similar yet more accurate is better still, more similar and less accurate worse; else nothing can be said
    if (compared.side < 0 and passed is False) or (compared.side > 0 and passed):
        passed = None
    return Finding(
        "more accurate than noise-perturbed originals of equal similarity",
        f"{compared.difference:+.4f}{error} over {compared.noise_accuracy:.4f}{note}",
        f"> {slack:.4f} (2 standard errors; within them nothing is claimed)",
        passed,
    )


def _against(found: Metric, other: Metric, claim: str) -> Finding:
    """Within two standard errors, where there are any."""
    errors = [metric.standard_error for metric in (found, other) if metric.standard_error is not None]
    slack = 2 * math.hypot(*errors) if errors else 0.0
    difference = found.value - other.value
    return Finding(
        claim,
        f"{difference:+.4f} ({found.value:.4f} against {other.value:.4f})",
        f">= -{slack:.4f} (2 standard errors)",
        difference >= -slack,
    )
