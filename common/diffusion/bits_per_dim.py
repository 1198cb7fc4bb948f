"""The whole variational bound of data under a Gaussian diffusion, one network call per step.

Dimensions: B rows, T steps; ``...`` the rest of a sample.

Source: Ho et al. (2020), equation 5; ``mup_dit`` specification 5.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.diffusion.gaussian import GaussianDiffusion
from common.diffusion.gaussian_likelihood import row_mean


@dataclass(frozen=True)
class Bound:
    """Bits per element: ``total_B`` = ``prior_B`` + the sum of ``terms_BT``; mean squares of x0 and noise by step."""

    total_B: Tensor
    prior_B: Tensor
    terms_BT: Tensor
    x0_mse_BT: Tensor
    eps_mse_BT: Tensor


@torch.no_grad()
def bits_per_dim(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    diffusion: GaussianDiffusion,
    draw: Callable[[], Tensor],
    *,
    clip_denoised: bool = True,
) -> Bound:
    """The bound on ``-log2 p(x0)`` per element, for 8-bit pixels in [-1, 1].

    Args:
        denoise: the network's output at x_t and its times ``(B,)``.
        draw: noise in the shape of ``x0``, new at every call; steps run from the noisiest to the first.
        clip_denoised: clips predicted x0 to [-1, 1].
    """
    terms, x0_mses, eps_mses = [], [], []
    for t in reversed(range(diffusion.num_steps)):
        t_B = torch.full((len(x0),), t, device=x0.device)
        noise = draw()
        x_t = diffusion.q_sample(x0, t, noise)
        output = denoise(x_t, diffusion.model_time(t_B))
        terms.append(diffusion.variational_bound(output, x0, x_t, t_B, clip_denoised=clip_denoised))
        found_x0 = diffusion.p_mean_variance(output, x_t, t, clip_denoised=clip_denoised).x0
        x0_mses.append(row_mean((found_x0 - x0) ** 2))
        eps_mses.append(row_mean((diffusion.eps_from_x0(x_t, t, found_x0) - noise) ** 2))
    terms_BT, x0_mse_BT, eps_mse_BT = (torch.stack(values[::-1], dim=1) for values in (terms, x0_mses, eps_mses))
    prior_B = diffusion.prior_bits(x0)
    return Bound(terms_BT.sum(1) + prior_B, prior_B, terms_BT, x0_mse_BT, eps_mse_BT)
