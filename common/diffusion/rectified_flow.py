"""Rectified flow: straight paths from data (t = 0) to noise (t = 1), and the velocity along them.

Dimensions: B rows; ``...`` the rest of a sample; t in [0, 1], a tensor ``(B,)`` or one float.

Source: Liu et al. (2022); Esser et al. (2024) for the logit-normal times and the shift.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import ConfigError


def _like(t: float | Tensor, x: Tensor) -> float | Tensor:
    return t.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(t, Tensor) else t


def interpolate(x0: Tensor, t: float | Tensor, noise: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t noise."""
    t = _like(t, x0)
    return (1 - t) * x0 + t * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """dx_t/dt = noise - x0, what the network predicts."""
    return noise - x0


def x0_from_velocity(x_t: Tensor, t: float | Tensor, velocity: Tensor) -> Tensor:
    """x0 = x_t - t v."""
    return x_t - _like(t, x_t) * velocity


def logit_normal_times(normal_B: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Times in (0, 1) whose logit is normal: more of the middle, where the velocity is hard to guess."""
    return torch.sigmoid(mean + std * normal_B)


def shift_time(t: float | Tensor, shift: float) -> float | Tensor:
    """``s t / (1 + (s - 1) t)``: more steps at high noise for s > 1, which large images need."""
    return shift * t / (1 + (shift - 1) * t)


def flow_times(steps: int, shift: float = 1.0) -> Sequence[float]:
    """steps + 1 times from 1 to 0, uniform before the shift.

    Raises: ConfigError for fewer than one step or a shift that is not positive.
    """
    if steps < 1:
        raise ConfigError(f"steps={steps}: a flow needs at least one.")
    if not shift > 0:
        raise ConfigError(f"shift={shift} must be positive; 1 leaves the times uniform, 3 is usual for 1024 pixels.")
    return [shift_time(1 - k / steps, shift) for k in range(steps + 1)]
