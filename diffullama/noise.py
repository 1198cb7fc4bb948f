"""Absorbing noise: times, and tokens replaced by the mask, with every random number given from outside.

The linear schedule alpha_t = 1 - t: at time t a token is masked with probability t, and the loss weight is 1/t.

Dimensions: B batch, L sequence, T steps of a discrete time grid.
"""

import torch
from torch import Tensor

TIME_EPS = 1e-3


def sample_time(r: Tensor, eps: float = TIME_EPS) -> Tensor:
    """t_B in [eps, 1] from uniforms: ``(1 - eps) r + eps``. Source: specification 4.1."""
    return (1 - eps) * r + eps


def stratified_time(batch: int, v: Tensor | float, rank: int = 0, world: int = 1) -> Tensor:
    """r_B: one uniform in each of the rank's strata of the global batch, ``(rank * B + b + v) / (world * B)``.

    Args:
        batch: rows of this rank.
        v: one uniform in [0, 1) for the whole step (the same on all ranks), or one per row.

    Source: specification 9.1; removes the variance of the times between steps.
    """
    index_B = torch.arange(batch, dtype=torch.float64) + rank * batch
    return ((index_B + v) / (batch * world)).float()


def add_noise(x: Tensor, t: Tensor, u: Tensor, mask_id: int, src_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(x_t, drawn)``: tokens masked where ``u < t`` outside ``src_mask``, and where that is.

    Args:
        x: int64 ``(B, L)``.
        t: ``(B,)`` times.
        u: uniforms ``(B, L)``.
        src_mask: nonzero where a token is given and never masked.

    ``drawn`` differs from ``x_t == mask_id`` where clean text already holds that id.
    """
    drawn_BL = u < t[:, None]
    if src_mask is not None:
        drawn_BL = drawn_BL & ~src_mask.bool()
    return torch.where(drawn_BL, mask_id, x), drawn_BL


def add_noise_discrete(
    x: Tensor, t_int: Tensor, T: int, u: Tensor, mask_id: int, src_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As ``add_noise`` at the integer times ``t_int`` of a grid of T steps: masked where ``u < t_int / T``."""
    return add_noise(x, t_int / T, u, mask_id, src_mask)


def add_noise_coupled(
    x: Tensor,
    t1: Tensor,
    t2: Tensor,
    T: int,
    u1: Tensor,
    u2: Tensor,
    u3: Tensor,
    mask_id: int,
    src_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two noise levels of each row, the second a subset of the first: ``(x_t (2B, L), masked (2B, L), t (2B,))``.

    With a = max(t1, t2) and b = min(t1, t2): the first half is masked where ``u1 < a / T``; the second keeps a masked
    position where ``u2 > (a - b) / a``. Rows with a = b are drawn afresh in the second half, where ``u3 < a / T``.

    Args:
        t1, t2: integer times in 1..T, ``(B,)``.
        u3: uniforms of the rows with t1 = t2, ``(number of such rows, L)`` in row order.

    Source: specification 4.1 (a utility of the reference that its training does not use).
    """
    high_B, low_B = torch.maximum(t1, t2), torch.minimum(t1, t2)
    maskable_BL = torch.ones_like(x, dtype=torch.bool) if src_mask is None else ~src_mask.bool()
    first_BL = (u1 < (high_B / T)[:, None]) & maskable_BL
    second_BL = first_BL & (u2 > ((high_B - low_B) / high_B)[:, None])
    equal_B = high_B == low_B
    if bool(equal_B.any()):
        second_BL = second_BL.clone()
        second_BL[equal_B] = (u3 < (high_B[equal_B] / T)[:, None]) & maskable_BL[equal_B]
    masked = torch.cat([first_BL, second_BL])
    return torch.where(masked, mask_id, x.repeat(2, 1)), masked, torch.cat([high_B, low_B])
