"""The reproduction's thresholds: what must come out, judged from the jobs' results."""

import itertools
import math
from collections.abc import Mapping

from common.report import Check
from radd.reproduction.sampling import BIASED
from radd.reproduction.settings import BOUND_LIMIT, SIGMAS


def joint_deviation(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """Distance of two estimates in joint standard errors, each corrected by its range term."""
    gap = (first["mean"] - first.get("range", 0.0)) - (second["mean"] - second.get("range", 0.0))
    return abs(gap) / math.hypot(first["error"], second["error"])


def bound_checks(scores: Mapping[str, Mapping], suffix: str = "") -> list[Check]:
    """Every cell below the limit; in every row, all pairs of estimators agree."""
    checks = []
    cells = [(row, column, cell) for row, score in scores.items() for column, cell in score["cells"].items()]
    row, column, worst = max(cells, key=lambda item: item[2]["mean"])
    checks.append(
        Check(
            claim=f"every bound is below {BOUND_LIMIT} nats per byte{suffix}",
            measured=f"largest {worst['mean']:.3f} ({row} scored by {column})",
            threshold=f"< {BOUND_LIMIT}",
            passed=worst["mean"] < BOUND_LIMIT,
        )
    )
    for row, score in scores.items():
        pairs = itertools.combinations(score["cells"].items(), 2)
        distance, left, right = max((joint_deviation(a, b), i, j) for (i, a), (j, b) in pairs)
        checks.append(
            Check(
                claim=f"trained with {row}: the four estimators agree{suffix}",
                measured=f"at most {distance:.2f} joint standard errors ({left}, {right})",
                threshold=f"<= {SIGMAS:g}",
                passed=distance <= SIGMAS,
            )
        )
        if "orders" in score:
            over_orders = score["orders"]["random"]
            distance, name = max((joint_deviation(cell, over_orders), name) for name, cell in score["cells"].items())
            checks.append(
                Check(
                    claim=f"trained with {row}: mean NLL over random orders equals the bound{suffix}",
                    measured=f"at most {distance:.2f} joint standard errors ({name})",
                    threshold=f"<= {SIGMAS:g}",
                    passed=distance <= SIGMAS,
                )
            )
    return checks


def calls_check(calls: Mapping, suffix: str = "") -> Check:
    """Measured calls of the sampler against E-NFE, for every number of steps."""
    points = calls["points"]
    distances = [
        (abs(point["measured"] - point["expected"]) / max(point["deviation"], 1e-12), point["steps"])
        # with a deviation of (almost) nothing the count is exact up to rounding of the expectation
        if abs(point["measured"] - point["expected"]) > 1e-6
        else (0.0, point["steps"])
        for point in points
    ]
    worst, steps = max(distances)
    return Check(
        claim=f"network calls per sequence equal E-NFE, {calls['noise']} noise{suffix}",
        measured=f"at most {worst:.2f} standard deviations of the mean (n = {steps})",
        threshold=f"< {SIGMAS:g}",
        passed=worst < SIGMAS,
    )


def precision_checks(shares: Mapping[str, Mapping], suffix: str = "") -> list[Check]:
    """Unbiased modes reproduce the tail share; one-stage draws in low precision fall below it."""
    checks = []
    for mode in ("two-stage", "float64"):
        found = shares[mode]
        distance = abs(found["share"] - found["true_share"]) / found["error"]
        checks.append(
            Check(
                claim=f"{mode} draws keep the share of rare tokens{suffix}",
                measured=f"{found['share']:.4f} of {found['true_share']:.4f}, {distance:.2f} binomial errors off",
                threshold=f"<= {SIGMAS:g}",
                passed=distance <= SIGMAS,
            )
        )
    reference = min(shares["two-stage"]["share"], shares["float64"]["share"], shares["float64"]["true_share"])
    for mode in BIASED:
        found = shares[mode]
        checks.append(
            Check(
                claim=f"one-stage {mode} draws lose rare tokens{suffix}",
                measured=f"{found['share']:.4f}",
                threshold=f"< {reference:.4f} (float64, two-stage, exact)",
                passed=found["share"] < reference,
            )
        )
    return checks
