"""Rectified flow: straight paths and their time grids."""

import pytest
import torch

from common.diffusion.rectified_flow import (
    flow_times,
    interpolate,
    logit_normal_times,
    shift_time,
    velocity,
    x0_from_velocity,
)
from common.errors import ConfigError


@pytest.mark.parametrize("t", [0.25, torch.tensor([0.0, 0.5, 1.0])])
def test_the_velocity_leads_back_to_the_data(t):
    rng = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, 2, 4, 4, generator=rng) for _ in range(2))
    x_t = interpolate(x0, t, noise)
    torch.testing.assert_close(x0_from_velocity(x_t, t, velocity(x0, noise)), x0)


def test_times_run_from_noise_to_data():
    assert flow_times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = flow_times(4, shift=3.0)
    assert (shifted[0], shifted[-1]) == (1.0, 0.0)
    assert all(late > early for late, early in zip(shifted[1:-1], flow_times(4)[1:-1], strict=True))
    assert shift_time(0.5, 3.0) == 0.75
    with pytest.raises(ConfigError, match="steps=0"):
        flow_times(0)
    with pytest.raises(ConfigError, match="shift=-1"):
        flow_times(4, -1.0)


def test_logit_normal_times_lie_inside():
    times = logit_normal_times(torch.linspace(-4, 4, 9))
    assert bool(((times > 0) & (times < 1)).all())
    assert times[4] == 0.5
