"""The whole bound: the sum of its terms, and close to the entropy of data whose exact network is known."""

import math

import torch

from common.diffusion.bits_per_dim import bits_per_dim
from common.diffusion.gaussian import build_diffusion

STD = 0.2


def test_the_bound_is_close_to_the_entropy():
    """Gaussian data narrow enough to stay inside [-1, 1], pixels of width 2/255."""
    diffusion = build_diffusion(400, variance="fixed_large")
    rng = torch.Generator().manual_seed(0)
    x0 = STD * torch.randn(40, 1, 4, 4, generator=rng)

    def exact_eps(x_t, t_B):
        abar = diffusion.alphas_cumprod[t_B].float().reshape(-1, 1, 1, 1)
        return (1 - abar).sqrt() * x_t / (abar * STD**2 + 1 - abar)

    bound = bits_per_dim(exact_eps, x0, diffusion, lambda: torch.randn(x0.shape, generator=rng), clip_denoised=False)
    entropy = (0.5 * math.log(2 * math.pi * math.e * STD**2) - math.log(2 / 255)) / math.log(2)
    assert entropy - 0.1 < float(bound.total_B.mean()) < entropy + 0.5
    assert bound.terms_BT.shape == (40, 400)
    torch.testing.assert_close(bound.total_B, bound.prior_B + bound.terms_BT.sum(1))
    assert bound.x0_mse_BT[:, 0].mean() < 0.01 * bound.x0_mse_BT[:, -1].mean()
    assert bound.eps_mse_BT.mean(0)[0] > bound.eps_mse_BT.mean(0)[-1]
