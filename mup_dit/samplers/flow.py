"""Rectified-flow sampling by Euler's and Heun's rules. Dimensions: B rows, C channels, S side.

Source: Liu et al. (2022); specification 3.6.
"""

import torch
from torch import Tensor

from common.diffusion.rectified_flow import flow_times
from mup_dit.samplers.ddpm import Denoiser


@torch.no_grad()
def sample_euler(velocity: Denoiser, x_BCSS: Tensor, steps: int, *, shift: float = 1.0) -> Tensor:
    """From noise at t = 1 to a sample at t = 0 in ``steps`` calls."""
    times = flow_times(steps, shift)
    for t, following in zip(times, times[1:], strict=False):
        x_BCSS = x_BCSS + (following - t) * velocity(x_BCSS, t)
    return x_BCSS


@torch.no_grad()
def sample_heun(velocity: Denoiser, x_BCSS: Tensor, steps: int, *, shift: float = 1.0) -> Tensor:
    """The same with slopes averaged over both ends of a step: second order, ``2 steps`` calls."""
    times = flow_times(steps, shift)
    for t, following in zip(times, times[1:], strict=False):
        slope = velocity(x_BCSS, t)
        ahead = velocity(x_BCSS + (following - t) * slope, following)
        x_BCSS = x_BCSS + (0.5 * (following - t)) * (slope + ahead)
    return x_BCSS
