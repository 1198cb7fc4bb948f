"""The reproduction's thresholds: what must come out, judged from the jobs' results."""

from collections.abc import Mapping

import numpy as np

from common.evaluation.metric import Metric, mean_metric
from common.report import Check
from diffullama.reproduction.settings import (
    ANNEALING_HARM,
    BELOW_SCRATCH_EQUAL,
    BELOW_SCRATCH_TOTAL,
    BOUND_LIMIT,
    CLOZE_BELOW_SCRATCH_TOTAL,
    ESTIMATOR_ERRORS,
    SHIFT_COST,
    SUFFIX_GAIN_ERRORS,
)


def paired(first: Mapping, second: Mapping) -> Metric:
    """Mean of the first minus the second over the same blocks, and its standard error over blocks."""
    return mean_metric("difference", np.array(first["blocks"]) - np.array(second["blocks"]))


def margin_check(claim: str, first: Mapping, second: Mapping, margin: float) -> Check:
    """``first`` lies below ``second`` by at least ``margin`` nats."""
    difference = paired(first, second)
    numbers = f"{difference.value:.3f} ± {difference.standard_error:.3f}"
    return Check(
        claim=claim,
        measured=f"{first['mean']:.3f} - {second['mean']:.3f} = {numbers}",
        threshold=f"<= {-margin:g}",
        passed=difference.value <= -margin,
    )


def adaptation_checks(scores: Mapping[str, Mapping], suffix: str = "") -> list[Check]:
    """The thresholds of one seed. Source: specification 10."""
    adapt, equal, total = scores["adapt"], scores["scratch-equal"], scores["scratch-total"]
    checks = [
        margin_check(
            f"adapting beats training from scratch for as many diffusion steps{suffix}",
            adapt["bound"],
            equal["bound"],
            BELOW_SCRATCH_EQUAL,
        ),
        margin_check(
            f"adapting beats training from scratch on as many tokens in all{suffix}",
            adapt["bound"],
            total["bound"],
            BELOW_SCRATCH_TOTAL,
        ),
        Check(
            claim=f"bound of the adapted network{suffix}",
            measured=f"{adapt['bound']['mean']:.3f} ± {adapt['bound']['mask_error']:.3f} nats per token",
            threshold=f"<= {BOUND_LIMIT:g}",
            passed=adapt["bound"]["mean"] <= BOUND_LIMIT,
        ),
        suffix_check(adapt["spans"]["gain"], suffix),
        margin_check(
            f"single hidden tokens: adapting beats scratch+{suffix}",
            adapt["cloze"]["nll"],
            total["cloze"]["nll"],
            CLOZE_BELOW_SCRATCH_TOTAL,
        ),
        infill_check(scores, suffix),
        estimator_check(scores, suffix),
    ]
    if "no-shift" in scores:
        claim = f"dropping the shift costs at least {SHIFT_COST:g} nats{suffix}"
        checks.append(margin_check(claim, adapt["bound"], scores["no-shift"]["bound"], SHIFT_COST))
    if "no-annealing" in scores:
        claim = f"annealing does not hurt by more than {ANNEALING_HARM:g} nats{suffix}"
        checks.append(margin_check(claim, adapt["bound"], scores["no-annealing"]["bound"], -ANNEALING_HARM))
    return checks


def suffix_check(gain: Mapping, suffix: str = "") -> Check:
    """The true suffix lowers the loss of a hidden span, block by block."""
    errors = gain["mean"] / max(gain["error"], 1e-12)
    return Check(
        claim=f"the adapted network uses the text after a gap{suffix}",
        measured=f"paired gain {gain['mean']:.4f} ± {gain['error']:.4f} nats per token, {errors:.1f} standard errors",
        threshold=f"> {SUFFIX_GAIN_ERRORS:g} standard errors",
        passed=errors > SUFFIX_GAIN_ERRORS,
    )


def infill_check(scores: Mapping[str, Mapping], suffix: str = "") -> Check:
    """Infilled texts hold no mask, and nothing outside the gap has changed."""
    masks = sum(score["infill"]["masks"] for score in scores.values())
    changed = sum(score["infill"]["changed_outside"] for score in scores.values())
    return Check(
        claim=f"infilled texts are whole{suffix}",
        measured=f"{masks} masks left, {changed} given tokens changed",
        threshold="0 and 0",
        passed=masks == 0 and changed == 0,
    )


def estimator_check(scores: Mapping[str, Mapping], suffix: str = "") -> Check:
    """Masking exact counts and masking at random times estimate the same bound."""
    distances = []
    for name, score in scores.items():
        if "bound_by_time" in score:
            by_count, by_time = score["bound"], score["bound_by_time"]
            joint = (by_count["mask_error"] ** 2 + by_time["error"] ** 2) ** 0.5
            distances.append((abs(by_count["mean"] - by_time["mean"]) / joint, name))
    worst, name = max(distances)
    return Check(
        claim=f"two estimators of the bound agree{suffix}",
        measured=f"at most {worst:.2f} joint standard errors ({name})",
        threshold=f"<= {ESTIMATOR_ERRORS:g}",
        passed=worst <= ESTIMATOR_ERRORS,
    )
