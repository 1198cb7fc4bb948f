"""DDIM: sampling with any share of noise, and the way back from a sample to its noise.

Dimensions: B rows, C channels, S side.

Source: Song et al. (2021), equations 12 and 16; specification 5.
"""

import math

import torch
from torch import Tensor

from common.diffusion.gaussian import GaussianDiffusion
from mup_dit.samplers.ddpm import Denoiser, Draw


@torch.no_grad()
def sample_ddim(
    denoise: Denoiser,
    x_BCSS: Tensor,
    diffusion: GaussianDiffusion,
    draw: Draw,
    *,
    eta: float = 0.0,
    clip_denoised: bool = False,
    gradient: Denoiser | None = None,
) -> Tensor:
    """From noise to a sample in ``diffusion.num_steps`` calls.

    Args:
        eta: 0 deterministic, without draws; 1 the variance of ancestral sampling.
        gradient: of log p(condition | x_t) at (x_t, time), from a classifier: it changes the noise by
            ``-sqrt(1 - abar)`` times it (Dhariwal and Nichol, 2021, algorithm 2).
    """
    for t in reversed(range(diffusion.num_steps)):
        x0, eps = _parts(diffusion, denoise(x_BCSS, diffusion.model_time(t)), x_BCSS, t, clip_denoised)
        if gradient is not None:
            sigma_t = float(diffusion.sqrt_one_minus_alphas_cumprod[t])
            eps = eps - sigma_t * gradient(x_BCSS, diffusion.model_time(t))
            x0 = diffusion.x0_from_eps(x_BCSS, t, eps)
        abar, previous = float(diffusion.alphas_cumprod[t]), float(diffusion.alphas_cumprod_prev[t])
        sigma = eta * math.sqrt((1 - previous) / (1 - abar) * (1 - abar / previous))
        x_BCSS = math.sqrt(previous) * x0 + math.sqrt(max(1 - previous - sigma**2, 0.0)) * eps
        if eta and t:
            x_BCSS = x_BCSS + sigma * draw()
    return x_BCSS


@torch.no_grad()
def invert_ddim(denoise: Denoiser, x0_BCSS: Tensor, diffusion: GaussianDiffusion, *, refinements: int = 0) -> Tensor:
    """The noise from which deterministic DDIM makes ``x0_BCSS``.

    Args:
        refinements: 0: Euler steps of the same equation upwards, each with the network at the level it leaves, as the
            reference does (the first takes the clean sample for its noisiest-but-clean level). More: so many
            fixed-point iterations per step of the exact inverse of the step that sampling takes there, one call each.
    """
    x_BCSS = x0_BCSS
    if refinements:
        for t in range(diffusion.num_steps):
            x_BCSS = _inverse_step(denoise, x_BCSS, diffusion, t, refinements)
        return x_BCSS
    for t in range(diffusion.num_steps - 1):
        x0, eps = _parts(diffusion, denoise(x_BCSS, diffusion.model_time(t)), x_BCSS, t, False)
        following = float(diffusion.alphas_cumprod_next[t])
        x_BCSS = math.sqrt(following) * x0 + math.sqrt(1 - following) * eps
    return x_BCSS


def _inverse_step(
    denoise: Denoiser, below_BCSS: Tensor, diffusion: GaussianDiffusion, t: int, refinements: int
) -> Tensor:
    """The x_t whose DDIM step leads to ``below = scale x_t + shift eps(x_t)``."""
    abar, previous = float(diffusion.alphas_cumprod[t]), float(diffusion.alphas_cumprod_prev[t])
    scale = math.sqrt(previous / abar)
    shift = math.sqrt(1 - previous) - scale * math.sqrt(1 - abar)
    x_BCSS = below_BCSS / scale
    for _ in range(refinements):
        _, eps = _parts(diffusion, denoise(x_BCSS, diffusion.model_time(t)), x_BCSS, t, False)
        x_BCSS = (below_BCSS - shift * eps) / scale
    return x_BCSS


def _parts(diffusion: GaussianDiffusion, output: Tensor, x_BCSS: Tensor, t: int, clip: bool) -> tuple[Tensor, Tensor]:
    """x0 and the noise that goes with it."""
    prediction, _ = diffusion.split(output, x_BCSS.shape[1])
    if diffusion.predict == "eps" and not clip:
        return diffusion.x0_from_eps(x_BCSS, t, prediction), prediction
    x0 = diffusion.x0_of(prediction, x_BCSS, t)
    x0 = x0.clamp(-1.0, 1.0) if clip else x0
    return x0, diffusion.eps_from_x0(x_BCSS, t, x0)
