"""Noise schedules: values, limits and refusals."""

import pytest
import torch

from common.diffusion.schedules import Geometric, LogLinear, build_schedule, log_odds
from common.errors import ConfigError

T = torch.linspace(0, 1, 101, dtype=torch.float64)


@pytest.mark.parametrize("schedule", [LogLinear(), Geometric(), Geometric(1e-3, 1.0)])
def test_rate_is_the_derivative_and_masking_follows_the_total_noise(schedule):
    t = T.clone().requires_grad_()
    (slope,) = torch.autograd.grad(schedule.sigma(t).sum(), t)
    torch.testing.assert_close(slope, schedule.dsigma(T), rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.mask_probability(T), 1 - torch.exp(-schedule.sigma(T)), rtol=1e-9, atol=1e-12)
    assert (schedule.mask_probability(T).diff() > 0).all()


def test_loglinear_masks_a_linearly_growing_share():
    torch.testing.assert_close(LogLinear().mask_probability(T), (1 - 1e-3) * T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_of_the_time_is_kept(dtype):
    for schedule in (LogLinear(), Geometric()):
        for function in (schedule.sigma, schedule.dsigma, schedule.mask_probability):
            assert function(T.to(dtype)).dtype == dtype


def test_log_odds_are_exact_for_tiny_and_huge_noise():
    sigma = torch.tensor([1e-8, 0.3, 20.0, 800.0], dtype=torch.float64)
    expected = torch.tensor([torch.log(torch.tensor(1e-8, dtype=torch.float64)).item() + 5e-9, 0, 0, 800.0])
    expected[1:3] = torch.log(torch.expm1(sigma[1:3]))
    torch.testing.assert_close(log_odds(sigma), expected.double(), rtol=1e-6, atol=0)


def test_unknown_schedule_and_bad_bounds_are_refused():
    with pytest.raises(ConfigError, match=r"noise\.type='loglinea'.*Did you mean 'loglinear'"):
        build_schedule("loglinea")
    with pytest.raises(ConfigError, match="sigma_max"):
        build_schedule("geometric", 1.0, 0.5)
    with pytest.raises(ConfigError, match=r"noise\.eps"):
        LogLinear(1.0)
