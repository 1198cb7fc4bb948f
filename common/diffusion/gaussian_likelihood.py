"""Divergences and likelihoods of diagonal Gaussians, in nats unless a name says bits.

Dimensions: B rows; all other axes belong to a row.

Source: Ho et al. (2020), section 3.3; ``mup_dit`` specification 4.2.
"""

import math

import torch
from torch import Tensor

NATS_PER_BIT = math.log(2.0)
HALF_BIN = 1.0 / 255.0  # of 8-bit pixels in [-1, 1]
FLOOR = 1e-12  # of a probability
EDGE = 0.999  # beyond it a pixel owns the whole tail


def row_mean(values: Tensor) -> Tensor:
    """``(B,)``: the mean over all axes but the first."""
    return values.flatten(1).mean(1)


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) per element."""
    difference = log_variance1 - log_variance2
    return 0.5 * (torch.exp(difference) - difference - 1.0 + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def approximate_normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal's distribution function."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of the bin of width 2/255 around ``x``; below -0.999 and above 0.999 the bin has an open end.

    Meant for pixels. The reference applies it to latents too, which leave [-1, 1], so that the open ends fire; kept
    for parity.
    """
    centred, inverse_std = x - mean, torch.exp(-log_std)
    upper = approximate_normal_cdf(inverse_std * (centred + HALF_BIN))
    lower = approximate_normal_cdf(inverse_std * (centred - HALF_BIN))
    inside = torch.log((upper - lower).clamp(min=FLOOR))
    above = torch.log((1.0 - lower).clamp(min=FLOOR))
    below = torch.log(upper.clamp(min=FLOOR))
    return torch.where(x < -EDGE, below, torch.where(x > EDGE, above, inside))
