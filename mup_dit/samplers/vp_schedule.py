"""The discrete noise schedule as a continuous one, which the fast solvers step through.

Knots t_j = j/T, j = 1..T, hold log alpha_j = 0.5 sum_{i<=j} ln(1 - beta_i); between them, and beyond them, log alpha is
linear in t. sigma = sqrt(1 - alpha^2), lam = ln(alpha / sigma). All in float64 and on the CPU: a solver reads plain
numbers and never waits for the device.

Source: Lu et al. (2022), appendix D; specification 5.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass

from torch import Tensor

from common.config import require_choice
from common.diffusion.gaussian import GaussianDiffusion
from common.errors import ConfigError

GRIDS = ("time_uniform", "time_quadratic", "logsnr")


@dataclass(frozen=True)
class Level:
    """A point of the schedule: continuous time, signal, noise, half log-SNR, and the time the network is given."""

    t: float
    alpha: float
    sigma: float
    lam: float
    model_time: float


class VPSchedule:
    """Args: diffusion: the process that the network was trained on, with all its steps.

    Raises: ConfigError for a respaced process, or a prediction that has no x0 at fractional times.
    """

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        if diffusion.num_steps != diffusion.original_steps:
            raise ConfigError(
                f"the solver places its own steps; leave respacing empty (it keeps {diffusion.num_steps} of "
                f"{diffusion.original_steps} steps)."
            )
        if diffusion.predict == "previous_x":
            raise ConfigError("a network that predicts previous_x can only be sampled by ddpm or ddim.")
        self.num_steps, self.predict = diffusion.num_steps, diffusion.predict
        self._times = [(j + 1) / self.num_steps for j in range(self.num_steps)]
        self._log_alphas = (0.5 * (1.0 - diffusion.betas).log().cumsum(0)).tolist()

    def log_alpha(self, t: float) -> float:
        return _interpolate(t, self._times, self._log_alphas)

    def level(self, t: float) -> Level:
        log_alpha = self.log_alpha(t)
        sigma = math.sqrt(-math.expm1(2 * log_alpha))
        return Level(t, math.exp(log_alpha), sigma, log_alpha - math.log(sigma), (t - self._times[0]) * self.num_steps)

    def time_of(self, lam: float) -> float:
        """The time at a half log-SNR: alpha^2 = 1/(1 + exp(-2 lam))."""
        log_alpha = -0.5 * math.log1p(math.exp(-2 * lam))
        return _interpolate(-log_alpha, [-value for value in self._log_alphas], self._times)

    def grid(self, steps: int, kind: str = "time_uniform") -> list[Level]:
        """steps + 1 levels from t = 1 to t = 1/T.

        Raises: ConfigError for fewer than one step, more than the network knows, or an unknown kind.
        """
        require_choice("sampling.grid", kind, GRIDS)
        if not 1 <= steps < self.num_steps:
            raise ConfigError(f"sampling.steps={steps}: a solver takes 1 to {self.num_steps - 1} steps; 20 is usual.")
        first, last = self._times[-1], self._times[0]
        if kind == "logsnr":
            low, high = self.level(first).lam, self.level(last).lam
            times = [self.time_of(low + (high - low) * k / steps) for k in range(steps + 1)]
        elif kind == "time_quadratic":
            root, end = math.sqrt(first), math.sqrt(last)
            times = [(root + (end - root) * k / steps) ** 2 for k in range(steps + 1)]
        else:
            times = [first + (last - first) * k / steps for k in range(steps + 1)]
        return [self.level(t) for t in (first, *times[1:-1], last)]  # ends free of rounding

    def x0(self, output: Tensor, x_BCSS: Tensor, level: Level) -> Tensor:
        """The x0 that the network's output stands for; variance channels are left out."""
        prediction = output[:, : x_BCSS.shape[1]]
        if self.predict == "x0":
            return prediction
        if self.predict == "v":
            return level.alpha * x_BCSS - level.sigma * prediction
        return (x_BCSS - level.sigma * prediction) / level.alpha


def _interpolate(x: float, xs: list[float], ys: list[float]) -> float:
    """Piecewise linear through ascending knots, the first and last pieces continued."""
    upper = min(max(bisect_left(xs, x), 1), len(xs) - 1)
    x0, x1, y0, y1 = xs[upper - 1], xs[upper], ys[upper - 1], ys[upper]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
