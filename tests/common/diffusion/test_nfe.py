"""Reveal rates and the expected number of network calls."""

import math

import pytest
import torch

from common.diffusion.nfe import (
    calls_variance,
    expected_calls,
    expected_nfe,
    loglinear_nfe,
    nfe_curve,
    nfe_variance,
    reveal_distribution,
    update_rate,
)
from common.diffusion.schedules import Geometric, LogLinear
from common.errors import ConfigError

SCHEDULES = [LogLinear(), Geometric()]


def test_euler_equals_tweedie_for_loglinear_noise():
    for steps in (1, 7, 500):
        euler, tweedie = (update_rate(LogLinear(), method, steps) for method in ("euler", "tweedie"))
        assert torch.allclose(euler, tweedie, rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method", ["tweedie", "euler"])
@pytest.mark.parametrize("steps", [1, 2, 5, 100])
def test_rates_are_probabilities_and_everything_is_revealed(schedule, method: str, steps: int):
    rate_S = update_rate(schedule, method, steps)
    reveal_S = reveal_distribution(rate_S)
    assert ((rate_S >= 0) & (rate_S <= 1)).all()
    assert (reveal_S >= 0).all()
    assert reveal_S.sum() == pytest.approx(1, abs=1e-12)


def test_closed_form_equals_the_sum_as_the_grid_ends_at_zero():
    for steps, free in [(1, 5), (8, 3), (64, 200), (1024, 256)]:
        mean, variance = loglinear_nfe(steps, free)
        assert expected_nfe(steps, free, LogLinear(), eps=0.0) == pytest.approx(mean, rel=1e-9)
        assert nfe_variance(steps, free, LogLinear(), eps=0.0) == pytest.approx(variance, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    "steps, per_row, per_batch", [(32, 32.0, 32.0), (1024, 647.5, 1024.0), (4096, 906.1, 4021.0), (8192, 962.6, 7083.5)]
)
def test_calls_of_the_paper_for_1024_tokens(steps: int, per_row: float, per_batch: float):
    assert loglinear_nfe(steps, 1024)[0] == pytest.approx(per_row, abs=0.06)
    assert loglinear_nfe(steps, 16 * 1024)[0] == pytest.approx(per_batch, abs=0.06)


def test_geometric_noise_needs_fewer_calls():
    for steps, calls in [(32, 22.9), (128, 74.3), (1024, 370.4)]:
        assert expected_nfe(steps, 1024, Geometric()) == pytest.approx(calls, abs=0.06)


def test_mean_and_variance_equal_a_simulation():
    reveal_S = reveal_distribution(update_rate(Geometric(), "tweedie", 12))
    size, free = 20_000, 7
    steps_BL = torch.multinomial(reveal_S, size * free, replacement=True, generator=torch.Generator().manual_seed(0))
    hit_BS = torch.zeros(size, 12).scatter_(1, steps_BL.view(size, free), 1.0)
    calls_B = hit_BS.sum(1)
    mean, variance = expected_calls(reveal_S, free), calls_variance(reveal_S, free)
    assert abs(calls_B.mean() - mean) < 4 * math.sqrt(variance / size)
    assert calls_B.var() == pytest.approx(variance, rel=0.05)


def test_limits():
    schedule = LogLinear()
    assert expected_nfe(1, 100, schedule) == 1
    assert expected_nfe(50, 0, schedule) == 0
    assert expected_nfe(math.inf, 100, schedule) == 100
    assert expected_nfe(10**6, 100, schedule) == pytest.approx(100, abs=0.01)
    assert nfe_variance(50, 0, schedule) == 0


def test_the_curve_rises_to_the_number_of_tokens():
    points = nfe_curve([1, 8, 64, 512, 4096], 64, LogLinear())
    means = [mean for _, mean, _ in points]
    assert means == sorted(means)
    assert means[-1] < 64
    assert points[0][2] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "analytic"}, "tweedie, euler"),
        ({"steps": 0}, "at least 1"),
        ({"steps": 2.5}, "integer"),
        ({"eps": 1.0}, r"\[0, 1\)"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        update_rate(**({"schedule": LogLinear(), "method": "tweedie", "steps": 4} | options))
