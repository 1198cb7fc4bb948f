"""Ancestral sampling. Dimensions: B rows, C channels, S side.

Source: Ho et al. (2020), algorithm 2; specification 5.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from common.diffusion.gaussian import GaussianDiffusion

Denoiser = Callable[[Tensor, float], Tensor]
Draw = Callable[[], Tensor]


@torch.no_grad()
def sample_ddpm(
    denoise: Denoiser,
    x_BCSS: Tensor,
    diffusion: GaussianDiffusion,
    draw: Draw,
    *,
    clip_denoised: bool = False,
    gradient: Denoiser | None = None,
) -> Tensor:
    """From noise to a sample in ``diffusion.num_steps`` calls; one draw per step, of which the last is not made.

    Args:
        clip_denoised: clips every predicted x0 to [-1, 1]; for pixels, not for latents.
        gradient: of log p(condition | x_t) at (x_t, time), from a classifier: it shifts every mean by the variance
            times it (Dhariwal and Nichol, 2021, algorithm 1).
    """
    for t in reversed(range(diffusion.num_steps)):
        output = denoise(x_BCSS, diffusion.model_time(t))
        moments = diffusion.p_mean_variance(output, x_BCSS, t, clip_denoised=clip_denoised)
        mean = moments.mean
        if gradient is not None:
            mean = mean + moments.variance * gradient(x_BCSS, diffusion.model_time(t))
        x_BCSS = mean
        if t:
            x_BCSS = torch.addcmul(x_BCSS, torch.exp(0.5 * moments.log_variance), draw())
    return x_BCSS
