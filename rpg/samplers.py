"""Samplers of token diffusion as pure functions of a noise prediction, a start and noise; no sampler knows a network.

``predict(x_RD, t)`` is the noise in ``x_RD`` at integer time t. ``noise(i)`` is the i-th standard normal ``(R, D)``,
asked for in order, i = 0, 1, ... A sampler yields the state after each of its steps.

Dimensions: R rows, D values, T times.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from common.errors import ConfigError
from rpg.noise_schedule import ScheduleTables

Predict = Callable[[Tensor, int], Tensor]
Noise = Callable[[int], Tensor]
KINDS = ("trailing", "ddpm", "ddim", "dpm_solver_sde", "heun")
GRIDS = ("linear", "quadratic")


def ddpm(predict: Predict, x_RD: Tensor, tables: ScheduleTables, noise: Noise) -> Iterator[Tensor]:
    """All T steps of the ancestral chain; the state after each.

    Source: Ho et al., 2020, algorithm 2, with the posterior variance.
    """
    coeff_1, coeff_2 = tables.coeff_1_T.tolist(), tables.coeff_2_T.tolist()
    deviation = tables.posterior_variance_T.sqrt().tolist()
    last = len(coeff_1) - 1
    for t in range(last, -1, -1):
        x_RD = coeff_1[t] * x_RD - coeff_2[t] * predict(x_RD, t)
        if t > 0:
            x_RD = x_RD + deviation[t] * noise(last - t)
        yield x_RD


def ddim(
    predict: Predict, x_RD: Tensor, tables: ScheduleTables, noise: Noise, *, steps: int, eta: float, grid: str
) -> Iterator[Tensor]:
    """The released few-step sampler. Its grid leaves out the noisiest times and it ends at ``abar_0`` instead of 1, so
    that a little noise stays; noise is drawn in every step. ``trailing`` repairs both.

    Source: Song et al., 2021 (DDIM), equation 12, on the released grid.
    """
    abar = tables.abar_T.tolist()
    times = released_times(steps, len(abar), grid)
    before = [0, *times[:-1]]
    for index, (t, previous) in enumerate(zip(reversed(times), reversed(before), strict=True)):
        x_RD = _ddim_step(predict(x_RD, t), x_RD, abar[t], abar[previous], eta, lambda index=index: noise(index))
        yield x_RD


def trailing(
    predict: Predict, x_RD: Tensor, tables: ScheduleTables, noise: Noise, *, steps: int, eta: float
) -> Iterator[Tensor]:
    """Few ancestral steps from T - 1, the last one to a clean token. With ``eta`` 1 it keeps the marginals by fresh
    noise, which suits this model far better than few deterministic steps.

    Source: DDIM (equation 12) on the trailing grid of Lin et al., 2024.
    """
    abar = tables.abar_T.tolist()
    times = trailing_times(steps, len(abar))
    for index, t in enumerate(times):
        is_last = index + 1 == len(times)
        target = 1.0 if is_last else abar[times[index + 1]]
        x_RD = _ddim_step(predict(x_RD, t), x_RD, abar[t], target, eta, lambda index=index: noise(index))
        yield x_RD


def dpm_solver_sde(
    predict: Predict, x_RD: Tensor, tables: ScheduleTables, noise: Noise, *, steps: int
) -> Iterator[Tensor]:
    """Second-order multistep solver of the reverse SDE, on the trailing grid.

    Source: Lu et al., 2022 (DPM-Solver++), SDE variant, in the log-SNR of x0 predictions.
    """
    abar = tables.abar_T.tolist()
    times = trailing_times(steps, len(abar))
    older: tuple[float, Tensor] | None = None  # log-SNR half and x0 of the step before
    for index, t in enumerate(times):
        signal, rate = math.sqrt(abar[t]), math.sqrt(1 - abar[t])
        x0_RD = (x_RD - rate * predict(x_RD, t)) / signal
        if index + 1 == len(times):
            yield x0_RD
            return
        following = abar[times[index + 1]]
        half, next_half = _half_log_snr(abar[t]), _half_log_snr(following)
        h = next_half - half
        slope = x0_RD if older is None else x0_RD + (h / (half - older[0])) / 2 * (x0_RD - older[1])
        older = (half, x0_RD)
        next_rate = math.sqrt(1 - following)
        x_RD = (next_rate / rate * math.exp(-h)) * x_RD + math.sqrt(following) * -math.expm1(-2 * h) * slope
        x_RD = x_RD + next_rate * math.sqrt(-math.expm1(-2 * h)) * noise(index)
        yield x_RD


def heun(
    predict: Predict, x_RD: Tensor, tables: ScheduleTables, noise: Noise, *, steps: int, churn: float
) -> Iterator[Tensor]:
    """Second-order steps in the noise level with churn: each step first adds noise up to an earlier time of the table.

    Two evaluations a step except the last.

    Args:
        churn: relative growth of the noise level before each step; 0: deterministic.

    Source: Karras et al., 2022 (EDM), algorithm 2, with levels rounded to the T trained ones.
    """
    abar = tables.abar_T.tolist()
    level = [math.sqrt((1 - share) / share) for share in abar]
    times = trailing_times(steps, len(abar))

    def slope(y_RD: Tensor, t: int) -> Tensor:
        return predict(y_RD * math.sqrt(abar[t]), t)  # d y / d level is the predicted noise

    y_RD = x_RD / math.sqrt(abar[times[0]])
    for index, t in enumerate(times):
        raised = t
        while raised + 1 < len(level) and level[raised + 1] <= level[t] * (1 + churn):
            raised += 1
        y_RD = y_RD + math.sqrt(max(level[raised] ** 2 - level[t] ** 2, 0.0)) * noise(index)
        first = slope(y_RD, raised)
        if index + 1 == len(times):
            yield y_RD - level[raised] * first
            return
        following = times[index + 1]
        h = level[following] - level[raised]
        second = slope(y_RD + h * first, following)
        y_RD = y_RD + h * 0.5 * (first + second)
        yield y_RD * math.sqrt(abar[following])


def released_times(steps: int, num_times: int, grid: str = "linear") -> list[int]:
    """Rising times of the released DDIM, each moved up by one; those beyond the table are clipped to its end."""
    check_steps(steps, num_times)
    if grid == "linear":
        times = range(0, num_times, num_times // steps)[:steps]
    else:
        times = (torch.linspace(0, math.sqrt(num_times * 0.8), steps, dtype=torch.float64) ** 2).int().tolist()
    return [min(t + 1, num_times - 1) for t in times]


def trailing_times(steps: int, num_times: int) -> list[int]:
    """Falling times from ``num_times - 1`` to 0, evenly spaced; one step starts, and ends, at the noisiest."""
    check_steps(steps, num_times)
    return torch.linspace(num_times - 1, 0, steps, dtype=torch.float64).round().int().tolist()


def check_steps(steps: int, num_times: int) -> None:
    """Raises ConfigError unless a chain over ``num_times`` times can have so many steps."""
    if not 1 <= steps <= num_times:
        raise ConfigError(
            f"sampling.steps={steps} must lie in 1..{num_times}, the times the model was trained on; 50 is usual."
        )


def trajectory(states: Iterator[Tensor], start_RD: Tensor, interval: int) -> tuple[Tensor, Tensor]:
    """The last state, and ``(R, kept, D)``: the start, the states after each ``interval`` steps, and the last."""
    kept, count, last = [start_RD], 0, start_RD
    for count, last in enumerate(states, start=1):
        if count % interval == 0:
            kept.append(last)
    if count % interval:
        kept.append(last)
    return last, torch.stack(kept, dim=1)


def _ddim_step(
    eps_RD: Tensor, x_RD: Tensor, abar: float, target: float, eta: float, noise: Callable[[], Tensor]
) -> Tensor:
    sigma = eta * math.sqrt(max((1 - target) / (1 - abar) * (1 - abar / target), 0.0))
    on_eps = math.sqrt(max(1 - target - sigma**2, 0.0)) - math.sqrt(target * (1 - abar) / abar)
    x_RD = math.sqrt(target / abar) * x_RD + on_eps * eps_RD
    return x_RD + sigma * noise() if sigma > 0 else x_RD


def _half_log_snr(abar: float) -> float:
    return 0.5 * math.log(abar / (1 - abar))
