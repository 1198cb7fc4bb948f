"""Noise schedules of Gaussian diffusion in discrete time, and the choice of a few of their steps for sampling.

Everything is float64 on the CPU. T is the number of steps; step t adds noise of variance beta_t, t = 0..T-1.

Source: Ho et al. (2020), Nichol and Dhariwal (2021), ``mup_dit`` specification 4.2.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from common.config import require_at_least, require_choice
from common.errors import ConfigError

SCHEDULES = ("linear", "cosine", "quad", "const", "jsd", "warmup10", "warmup50")
ALIASES = {"squaredcos_cap_v2": "cosine"}  # the name that ADM and diffusers use
BETA_START, BETA_END = 1e-4, 0.02  # of 1000 steps
MAX_BETA = 0.999  # of the cosine schedule, whose last steps would else remove everything
DDIM = "ddim"


def build_betas(schedule: str, steps: int) -> Tensor:
    """float64 ``(T,)``.

    ``linear``, ``quad``, ``const`` and the warm-ups run from 1e-4 to 0.02 times 1000/T, which keeps the total noise
    about the same for every T; ``cosine`` has abar(u) = cos^2(pi/2 (u + 0.008)/1.008); ``jsd`` is 1/T, 1/(T-1), ..., 1,
    whose last level holds no signal, so that no x0 follows from a predicted noise there.

    Raises: ConfigError for an unknown name, or so few steps that a beta would exceed one.
    """
    schedule = ALIASES.get(schedule, schedule)
    require_choice("schedule", schedule, SCHEDULES)
    require_at_least("steps", steps, 1)
    start, end = (value * 1000.0 / steps for value in (BETA_START, BETA_END))
    if schedule == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    elif schedule == "quad":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    elif schedule == "jsd":
        betas = 1.0 / torch.linspace(steps, 1, steps, dtype=torch.float64)
    elif schedule == "cosine":
        u = torch.arange(steps + 1, dtype=torch.float64) / steps
        abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - abar[1:] / abar[:-1]).clamp(max=MAX_BETA)
    else:
        betas = torch.full((steps,), end, dtype=torch.float64)
        if schedule != "const":
            rising = int(steps * int(schedule.removeprefix("warmup")) / 100)
            betas[:rising] = torch.linspace(start, end, rising, dtype=torch.float64)
    if float(betas.max()) > 1.0:
        raise ConfigError(
            f"steps={steps} is too few for schedule={schedule}: its largest beta would be "
            f"{float(betas.max()):.3g}, above 1. Use at least {math.ceil(1000 * BETA_END)} steps, or schedule=cosine."
        )
    return betas


def space_timesteps(steps: int, respacing: str | Sequence[int]) -> list[int]:
    """The original steps that sampling keeps, ascending.

    Args:
        steps: T.
        respacing: ``"a,b,c"`` (or the numbers): T is cut into equal sections, the first T mod k one longer, and a, b, c
            evenly spaced steps are kept of them; ``"ddimN"``: a fixed whole stride that gives exactly N steps;
            empty: all.

    Raises: ConfigError if a section has fewer steps than asked for, or no whole stride gives N.
    """
    if isinstance(respacing, str):
        if respacing.startswith(DDIM):
            return _fixed_stride(steps, _whole(respacing, respacing.removeprefix(DDIM)))
        counts = [_whole(respacing, part) for part in respacing.split(",")] if respacing else [steps]
    else:
        counts = [int(count) for count in respacing]
    size, longer = divmod(steps, len(counts))
    kept: list[int] = []
    start = 0
    for index, count in enumerate(counts):
        length = size + (index < longer)
        if count < 1 or count > length:
            raise ConfigError(
                f"respacing={respacing!r} asks for {count} of the {length} steps of section {index} "
                f"({steps} steps in all); ask for 1 to {length}."
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        place = 0.0
        for _ in range(count):
            kept.append(start + round(place))
            place += stride  # accumulated, as the reference does: a product would round a few steps otherwise
        start += length
    return kept


def _fixed_stride(steps: int, count: int) -> list[int]:
    for stride in range(1, steps):
        if len(range(0, steps, stride)) == count:
            return list(range(0, steps, stride))
    raise ConfigError(
        f"respacing=ddim{count}: no whole stride keeps exactly {count} of {steps} steps; use respacing={count}, which "
        "spaces them unevenly, or a divisor."
    )


def _whole(respacing: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"respacing={respacing!r} is no list of numbers; write for example 250, 10,15,20 or ddim50."
        ) from None


def respaced_betas(betas_T: Tensor, kept: Sequence[int]) -> Tensor:
    """Betas of the shorter process that visits only the ``kept`` steps: 1 - abar_i / abar_previous."""
    abar = torch.cumprod(1.0 - betas_T, 0)[list(kept)]
    return 1.0 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
