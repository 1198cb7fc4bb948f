"""Noise schedules of absorbing ("masked") diffusion: how likely a token is masked at time t.

Every token is independently replaced by the mask with probability ``lambda(t) = 1 - exp(-sigma_bar(t))``. A schedule
owns no parameters and keeps the dtype of its input, so float64 in gives float64 out.

Dimensions: any shape of times; results have the same shape.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from common.config import require_choice
from common.errors import ConfigError

SCHEDULES = ("loglinear", "geometric")


class Schedule(Protocol):
    """What losses and samplers need to know about the noise."""

    def sigma(self, t: Tensor) -> Tensor:
        """Total noise sigma_bar(t)."""

    def dsigma(self, t: Tensor) -> Tensor:
        """Noise rate sigma(t), the derivative of the total noise."""

    def mask_probability(self, t: Tensor) -> Tensor:
        """lambda(t), the probability that a token is masked at time t."""


@dataclass(frozen=True)
class LogLinear:
    """Masked share ``(1 - eps) * t``: linear in time and below one at t = 1.

    Attributes:
        eps: share of tokens that is still visible at t = 1; keeps sigma finite.

    Source: log-linear noise of SEDD (Lou et al., 2024), kept by RADD; specification section 3.1.
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.eps < 1:
            raise ConfigError(f"noise.eps={self.eps} must lie in [0, 1); the reference uses 1e-3.")

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.log1p(-(1 - self.eps) * t)

    def dsigma(self, t: Tensor) -> Tensor:
        return (1 - self.eps) / (1 - (1 - self.eps) * t)

    def mask_probability(self, t: Tensor) -> Tensor:
        return (1 - self.eps) * t


@dataclass(frozen=True)
class Geometric:
    """Total noise that grows geometrically from ``sigma_min`` at t = 0 to ``sigma_max`` at t = 1.

    Source: geometric noise of SEDD and RADD; specification section 3.1 (bounds of the released configuration).
    """

    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ConfigError(
                f"noise.sigma_min={self.sigma_min}, noise.sigma_max={self.sigma_max} must satisfy "
                "0 < sigma_min < sigma_max; the reference uses 1e-4 and 20."
            )

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min ** (1 - t) * self.sigma_max**t

    def dsigma(self, t: Tensor) -> Tensor:
        return self.sigma(t) * math.log(self.sigma_max / self.sigma_min)

    def mask_probability(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self.sigma(t))


def build_schedule(type: str = "loglinear", sigma_min: float = 1e-4, sigma_max: float = 20.0) -> LogLinear | Geometric:
    """The schedule named by ``noise.type``; the two bounds matter to ``geometric`` only.

    Raises: ConfigError for an unknown type or bounds that are not increasing and positive.
    """
    require_choice("noise.type", type, SCHEDULES)
    return LogLinear() if type == "loglinear" else Geometric(sigma_min, sigma_max)


def log_odds(sigma: Tensor) -> Tensor:
    """ln(exp(sigma) - 1), the log-odds of being masked, without overflow for large noise."""
    return sigma + torch.log(-torch.expm1(-sigma))
