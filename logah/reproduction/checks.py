"""The reproduction's thresholds: what must come out, judged from the scores of trained nets."""

from collections.abc import Sequence

from common.evaluation.metric import Metric
from common.report import Check
from logah.reproduction.runs import Run, by_rate, difference_at, mean_at
from logah.reproduction.settings import (
    ACCURACY_GAIN,
    EARLY_GAIN,
    FIRST_GAIN,
    SIZE_RATIO,
    START_ACCURACY,
    Settings,
)


def shown(metric: Metric, form: str = ".3f") -> str:
    """``0.965 ± 0.001``: a value and its standard error, if it has one."""
    error = "" if metric.standard_error is None else f" ± {metric.standard_error:{form.lstrip('+')}}"
    return f"{metric.value:{form}}{error}"


def percent(metric: Metric, form: str = ".1f") -> str:
    """A share in percent, with its standard error."""
    error = None if metric.standard_error is None else 100 * metric.standard_error
    return shown(Metric(metric.name, 100 * metric.value, error), form)


def vision_checks(settings: Settings, logah: Sequence[Run], random: Sequence[Run], suffix: str = "") -> list[Check]:
    """Predicted nets classify before any training, and train to a better accuracy than random ones."""
    start = mean_at(logah, 0)
    gain = difference_at(logah, random, settings.epochs)
    reached, base = mean_at(logah, settings.epochs), mean_at(random, settings.epochs)
    return [
        Check(
            claim=f"vision: predictions for larger nets than any trained on classify without training{suffix}",
            measured=f"{percent(start)} % of unseen digits (random {percent(mean_at(random, 0))} %)",
            threshold=f"> {100 * START_ACCURACY:g} %",
            passed=start.value > START_ACCURACY,
        ),
        Check(
            claim=f"vision: after {settings.epochs} epochs they are better than random starts{suffix}",
            measured=f"{percent(gain, '+.1f')} points: {percent(reached)} against {percent(base)} %",
            threshold=f">= +{100 * ACCURACY_GAIN:g} points, mean of all nets and learning rates",
            passed=gain.value >= ACCURACY_GAIN,
        ),
    ]


def language_checks(settings: Settings, logah: Sequence[Run], random: Sequence[Run], suffix: str = "") -> list[Check]:
    """Predicted language models start far below random ones, and stay below them early in training."""
    first = settings.language_nets[0].label
    gain = difference_at([run for run in random if run.net == first], [run for run in logah if run.net == first], 0)
    checks = [
        Check(
            claim=f"language: the prediction for {first} starts with a lower loss than random weights{suffix}",
            measured=f"{shown(gain)} nats per token lower",
            threshold=f">= {FIRST_GAIN:g}",
            passed=gain.value >= FIRST_GAIN,
        )
    ]
    for net in settings.language_nets:
        ours, theirs = (
            min(by_rate(runs, net.label, settings.early_step).values(), key=lambda metric: metric.value)
            for runs in (logah, random)
        )
        checks.append(
            Check(
                claim=f"language: {net.label} after {settings.early_step} steps, the predicted start is below the "
                f"random one, each with its best learning rate{suffix}",
                measured=f"{shown(ours)} against {shown(theirs)}: {theirs.value - ours.value:.3f} lower",
                threshold=f">= {EARLY_GAIN:g} nats per token",
                passed=theirs.value - ours.value >= EARLY_GAIN,
            )
        )
    return checks


def size_check(logah: int, dense: int, suffix: str = "") -> Check:
    """The low-rank decoder makes the hypernetwork several times smaller than GHN-3 of the same width."""
    return Check(
        claim=f"LoGAH is smaller than GHN-3 of the same width{suffix}",
        measured=f"{logah:,} against {dense:,} parameters: {dense / logah:.1f} times",
        threshold=f">= {SIZE_RATIO:g} times",
        passed=dense / logah >= SIZE_RATIO,
    )
