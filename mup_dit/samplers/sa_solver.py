"""SA-Solver: a stochastic predictor and corrector of Adams type, in its data-prediction form.

Dimensions: B rows, C channels, S side.

Source: Xue et al. (2023), section 4; specification 5. Our weights are shifted so that the new point has lam = 0, which
keeps the digits that the unshifted integrals lose at large lam.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.config import require_choice
from mup_dit.samplers.ddpm import Denoiser, Draw
from mup_dit.samplers.vp_schedule import Level, VPSchedule

ORDERS = (1, 2, 3)


def middle_noise(eta: float, first: float = 0.2, last: float = 0.8) -> Callable[[float], float]:
    """tau(t): ``eta`` in the middle of the process, none at its ends."""
    return lambda t: eta if first <= t <= last else 0.0


@torch.no_grad()
def sample_sa_solver(
    denoise: Denoiser,
    x_BCSS: Tensor,
    schedule: VPSchedule,
    steps: int,
    draw: Draw,
    *,
    tau: Callable[[float], float],
    predictor_order: int = 2,
    corrector_order: int = 2,
    grid: str = "time_uniform",
) -> Tensor:
    """From noise to a sample in ``steps`` calls and as many draws: predict, evaluate, correct.

    Args:
        tau: noise at a time in [0, 1]; 0 everywhere: a deterministic solver.
    """
    require_choice("sampling.predictor_order", predictor_order, ORDERS)
    require_choice("sampling.corrector_order", corrector_order, ORDERS)
    levels = schedule.grid(steps, grid)
    found = [schedule.x0(denoise(x_BCSS, levels[0].model_time), x_BCSS, levels[0])]  # newest first
    for k in range(1, steps + 1):
        past, to, noise = levels[max(0, k - 3) : k][::-1], levels[k], draw()
        last = k == steps
        strength = 0.0 if last else tau(to.t)
        order = min(predictor_order, k, steps - k + 1)
        predicted = _step(x_BCSS, found[:order], past[:order], past[0], to, strength, noise, is_corrector=False)
        if last:
            return predicted
        new = schedule.x0(denoise(predicted, to.model_time), predicted, to)
        order = min(corrector_order, k + 1, steps - k + 2)
        nodes, values = [to, *past][:order], [new, *found][:order]
        x_BCSS = _step(x_BCSS, values, nodes, past[0], to, strength, noise, is_corrector=True)
        found = [new, *found[:2]]
    return x_BCSS


def _step(
    x: Tensor,
    values: Sequence[Tensor],
    nodes: Sequence[Level],
    here: Level,
    to: Level,
    tau: float,
    noise: Tensor,
    *,
    is_corrector: bool,
) -> Tensor:
    """``exp(-tau^2 h) sigma_t/sigma_s x + kap alpha_t sum w_i m_i + sigma_t sqrt(1 - exp(-2 tau^2 h)) noise``."""
    h, kap = to.lam - here.lam, 1.0 + tau**2
    weights = lagrange_weights([node.lam - to.lam for node in nodes], h, kap)
    if len(weights) == 2:
        # the reference's correction of second order, of the size of what the linear interpolation neglects
        g = (h * kap - 1.0 + math.exp(-kap * h)) / kap**2
        change = h / 2 - g / h if is_corrector else (h**2 / 2 - g) / (nodes[0].lam - nodes[1].lam)
        weights = [weights[0] + change, weights[1] - change]
    x = (math.exp(-(tau**2) * h) * to.sigma / here.sigma) * x
    for weight, value in zip(weights, values, strict=True):
        x = x + (kap * to.alpha * weight) * value
    if tau:
        x = x + (to.sigma * math.sqrt(-math.expm1(-2 * tau**2 * h))) * noise
    return x


def lagrange_weights(nodes: Sequence[float], h: float, kap: float) -> list[float]:
    """``int_{-h}^0 exp(kap v) l_i(v) dv`` for the Lagrange basis l_i on ``nodes``."""
    moments = _exponential_moments(len(nodes), h, kap)
    weights = []
    for i, node in enumerate(nodes):
        polynomial = [1.0]  # coefficients of v^0, v^1, ...
        for j, other in enumerate(nodes):
            if j != i:
                scale = node - other
                shifted = [0.0, *polynomial]
                polynomial = [
                    (high - other * low) / scale for high, low in zip(shifted, [*polynomial, 0.0], strict=True)
                ]
        weights.append(sum(c * m for c, m in zip(polynomial, moments, strict=True)))
    return weights


def _exponential_moments(count: int, h: float, kap: float) -> list[float]:
    """``int_{-h}^0 v^n exp(kap v) dv`` for n = 0..count-1, by parts."""
    end = math.exp(-kap * h)
    moments = [-math.expm1(-kap * h) / kap]
    for n in range(1, count):
        moments.append(-((-h) ** n) * end / kap - n / kap * moments[-1])
    return moments
