"""How often a network that does not see the time has to be called: reveal rates, their distribution, E-NFE.

A masked position is revealed in step i of n with probability ``rate_i`` given that it is still masked, independently of
all other positions and of the tokens. So the step in which it is revealed is categorical, and the number of calls a
sequence needs is the number of distinct steps hit by its masked positions.

Dimensions: S steps of the time grid, T starting times.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from common.config import require_choice
from common.diffusion.schedules import Schedule
from common.errors import ConfigError

METHODS = ("tweedie", "euler")
DEFAULT_EPS = 1e-5  # time at which the reference's grid ends
_PAIR_CHUNK = 1 << 22  # pairs of steps handled at once by ``nfe_variance``


def require_steps(steps: int) -> None:
    """Raises ConfigError unless ``steps`` is an integer of at least 1."""
    if isinstance(steps, bool) or steps != int(steps) or steps < 1:
        raise ConfigError(f"steps={steps} must be an integer of at least 1; method=first_hitting has no step count.")


def update_rate(schedule: Schedule, method: str, steps: int, eps: float = DEFAULT_EPS, *, clamp: bool = True) -> Tensor:
    """Probability that a still masked position is unmasked in each step of the grid linspace(1, eps, n + 1).

    The last step is not forced here: ``reveal_distribution`` gives it all that is left.

    Args:
        schedule: the noise schedule.
        method: ``tweedie`` (exact posterior of the step) or ``euler`` (first order in the step length).
        steps: n.
        eps: time at which the grid ends.
        clamp: limits the rates to [0, 1]; False gives the raw formula, which exceeds one for ``euler`` with geometric
            noise and fewer than ln(sigma_max / sigma_min) steps.

    Returns:
        rate_S, float64.

    Source: RADD, reverse process with Tweedie tau-leaping and Euler steps; equal for log-linear noise.
    """
    require_choice("method", method, METHODS)
    require_steps(steps)
    if not 0 <= eps < 1:
        raise ConfigError(f"eps={eps} must lie in [0, 1): it is the time at which the grid, starting at 1, ends.")
    t_T = torch.linspace(1.0, eps, int(steps) + 1, dtype=torch.float64)
    if method == "euler":
        step_length = (1.0 - eps) / steps
        rate_S = step_length * schedule.dsigma(t_T[:-1]) / torch.expm1(schedule.sigma(t_T[:-1]))
    else:
        masked_T = schedule.mask_probability(t_T)
        rate_S = (masked_T[:-1] - masked_T[1:]) / masked_T[:-1]
    return rate_S.clamp(0.0, 1.0) if clamp else rate_S


def reveal_distribution(rate_S: Tensor) -> Tensor:
    """Probability that a position is revealed in each step; the last step takes whatever is left, so it sums to one."""
    stay_S = torch.cumprod(1.0 - rate_S.double(), dim=0)
    before_S = torch.cat([torch.ones(1, dtype=torch.float64), stay_S[:-1]])
    reveal_S = before_S * rate_S.double()
    reveal_S[-1] = before_S[-1]
    return reveal_S


def expected_calls(reveal_S: Tensor, free_tokens: int) -> float:
    """Expected number of distinct steps hit by ``free_tokens`` independent draws from ``reveal_S``."""
    return float((1.0 - (1.0 - reveal_S.double()) ** free_tokens).sum())


def calls_variance(reveal_S: Tensor, free_tokens: int) -> float:
    """Variance of that number; quadratic in the number of steps (0.2 s for 4096 steps)."""
    if free_tokens == 0:
        return 0.0
    r_S = reveal_S.double()
    empty_S = (1.0 - r_S) ** free_tokens
    covariance, rows = 0.0, max(1, _PAIR_CHUNK // len(r_S))
    for start in range(0, len(r_S), rows):
        part_R = r_S[start : start + rows]
        both_RS = (1.0 - part_R[:, None] - r_S[None, :]).clamp_min(0.0) ** free_tokens
        covariance += float((both_RS - empty_S[start : start + rows, None] * empty_S[None, :]).sum())
    # The pairs (i, i) above hold P(i and i empty) as if i were two steps; replace them by the variance of one.
    diagonal = (1.0 - 2.0 * r_S).clamp_min(0.0) ** free_tokens - empty_S**2
    return max(0.0, covariance - float(diagonal.sum()) + float((empty_S * (1.0 - empty_S)).sum()))


def expected_nfe(
    steps: float, free_tokens: int, schedule: Schedule, method: str = "tweedie", eps: float = DEFAULT_EPS
) -> float:
    """E-NFE: expected network calls per sequence for ``free_tokens`` masked positions; the limit for infinite steps.

    Source: RADD, E-NFE(n) = sum_i 1 - (1 - r_i)^l, which is n (1 - (1 - 1/n)^l) for log-linear noise and eps -> 0.
    """
    if math.isinf(steps):
        return float(free_tokens)
    return expected_calls(reveal_distribution(update_rate(schedule, method, int(steps), eps)), free_tokens)


def nfe_variance(
    steps: float, free_tokens: int, schedule: Schedule, method: str = "tweedie", eps: float = DEFAULT_EPS
) -> float:
    """Variance of the calls of one sequence, whose mean is ``expected_nfe``."""
    if math.isinf(steps):
        return 0.0
    return calls_variance(reveal_distribution(update_rate(schedule, method, int(steps), eps)), free_tokens)


def loglinear_nfe(steps: float, free_tokens: int) -> tuple[float, float]:
    """Closed-form mean and variance of the calls for log-linear noise and eps -> 0: n equally likely steps."""
    if math.isinf(steps):
        return float(free_tokens), 0.0
    n, power = steps, free_tokens
    empty = (1 - 1 / n) ** power
    both_empty = max(0.0, 1 - 2 / n) ** power if power else 1.0
    return n * (1 - empty), max(0.0, n * empty + n * (n - 1) * both_empty - n * n * empty * empty)


def nfe_curve(
    steps: Iterable[int], free_tokens: int, schedule: Schedule, method: str = "tweedie", eps: float = DEFAULT_EPS
) -> list[tuple[int, float, float]]:
    """Points (n, expected calls, standard deviation of one sequence) for a plot of E-NFE against n."""
    points = []
    for n in steps:
        reveal_S = reveal_distribution(update_rate(schedule, method, n, eps))
        points.append((n, expected_calls(reveal_S, free_tokens), math.sqrt(calls_variance(reveal_S, free_tokens))))
    return points
