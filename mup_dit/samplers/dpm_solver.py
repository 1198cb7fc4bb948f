"""DPM-Solver++ in its multistep forms of order 1, 2 and 3. Dimensions: B rows, C channels, S side.

Source: Lu et al. (2022b), algorithm 2 (2M) and its third-order extension; specification 5.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from common.config import require_choice
from mup_dit.samplers.ddpm import Denoiser
from mup_dit.samplers.vp_schedule import Level, VPSchedule

ORDERS = (1, 2, 3)
FEW_STEPS = 10  # with fewer, the last steps fall back to lower orders, which is more stable


@torch.no_grad()
def sample_dpm_solver(
    denoise: Denoiser,
    x_BCSS: Tensor,
    schedule: VPSchedule,
    steps: int,
    *,
    order: int = 2,
    grid: str = "time_uniform",
) -> Tensor:
    """From noise to a sample in ``steps`` calls, without draws.

    Args:
        order: 2 (2M), 3 (3M) or 1, which is DDIM. The first steps have lower orders, as they have no past.
    """
    require_choice("sampling.order", order, ORDERS)
    levels = schedule.grid(steps, grid)
    found: list[Tensor] = []  # predicted x0, newest first
    for k in range(1, steps + 1):
        past = levels[max(0, k - order) : k][::-1]
        x0 = schedule.x0(denoise(x_BCSS, past[0].model_time), x_BCSS, past[0])
        found = [x0, *found[: order - 1]]
        used = min(len(found), steps + 1 - k) if steps < FEW_STEPS else len(found)
        x_BCSS = _step(x_BCSS, found[:used], past[:used], levels[k])
    return x_BCSS


def _step(x: Tensor, found: Sequence[Tensor], past: Sequence[Level], to: Level) -> Tensor:
    """One step from ``past[0]`` to ``to``; the order is the number of predictions.

    The third order is the published update, with which released libraries agree; it takes half of the second
    difference that the Taylor series has.
    """
    here = past[0]
    h = to.lam - here.lam
    phi1 = math.expm1(-h)
    x = (to.sigma / here.sigma) * x - (to.alpha * phi1) * found[0]
    if len(found) == 1:
        return x
    r0 = (here.lam - past[1].lam) / h
    slope = (found[0] - found[1]) / r0
    if len(found) == 2:
        return x - (0.5 * to.alpha * phi1) * slope
    r1 = (past[1].lam - past[2].lam) / h
    older = (found[1] - found[2]) / r1
    first = slope + r0 / (r0 + r1) * (slope - older)
    second = (slope - older) / (r0 + r1)
    phi2 = phi1 / h + 1.0
    phi3 = phi2 / h - 0.5
    return x + (to.alpha * phi2) * first - (to.alpha * phi3) * second
