"""The state-space recurrence of Mamba-2 (SSD), chunked and step by step, in plain PyTorch.

Per head, ``S_t = exp(a_t A) S_{t-1} + a_t x_t B_t^T`` and ``y_t = S_t C_t + D x_t``;
``a_t = softplus(dt_t + bias)``.

Dimensions: B batch, L positions, H heads, P values per head, G groups of heads that share B and C, N state size,
c chunks, q positions per chunk.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def step_sizes(dt: Tensor, bias_H: Tensor) -> Tensor:
    """``a_t`` in float32."""
    return F.softplus(dt.float() + bias_H.float())


def ssd_scan(
    x_BLHP: Tensor,
    a_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None = None,
    *,
    chunk_size: int = 64,
    initial_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs of the recurrence and its last state; the chunk size changes the speed and not the numbers.

    Within a chunk the sum over earlier positions is one masked matrix product; between chunks only states are passed
    on, so time and memory are linear in L. Step sizes, decays and states are float32 in every precision; the matrix
    products take the dtype of ``x_BLHP``.

    Args:
        a_BLH: positive step sizes (``step_sizes``); 0 leaves the state as it is.
        A_H: negative.
        initial_BHPN: state before the first position; None: zero.

    Returns: ``y_BLHP`` in the dtype of x, and the state ``(B, H, P, N)`` after the last position, float32.

    Source: Dao and Gu, 2024 (Mamba-2), section 6.
    """
    batch, length, heads, width = x_BLHP.shape
    groups, state_size = B_BLGN.shape[2:]
    dtype, per_group = x_BLHP.dtype, heads // groups
    q = min(chunk_size, length)
    padding = -length % q
    chunks = (length + padding) // q

    weighted_BLHP = x_BLHP * a_BLH.to(dtype)[..., None]
    decay_BLH = a_BLH.float() * A_H.float()
    if padding:  # with a = 0 a position neither adds to the state nor lets it decay
        weighted_BLHP = F.pad(weighted_BLHP, (0, 0, 0, 0, 0, padding))
        decay_BLH = F.pad(decay_BLH, (0, 0, 0, padding))
        B_BLGN, C_BLGN = (F.pad(value, (0, 0, 0, 0, 0, padding)) for value in (B_BLGN, C_BLGN))

    # (B, c, G, H/G, ...) everywhere below; one axis of heads is written as r
    x_BcGrqP = weighted_BLHP.view(batch, chunks, q, groups, per_group, width).permute(0, 1, 3, 4, 2, 5)
    l_BcGrq = decay_BLH.view(batch, chunks, q, groups, per_group).permute(0, 1, 3, 4, 2).cumsum(-1)
    B_BcGqN = B_BLGN.view(batch, chunks, q, groups, state_size).transpose(2, 3)
    C_BcGqN = C_BLGN.view(batch, chunks, q, groups, state_size).transpose(2, 3)

    y_BcGrqP = _within_chunks(x_BcGrqP, l_BcGrq, B_BcGqN, C_BcGqN)
    end_BcGr1 = l_BcGrq[..., -1:]
    to_end_BcGrq = torch.exp(end_BcGr1 - l_BcGrq).to(dtype)
    # states of all heads of a group by one matrix product: (r P, q) @ (q, N)
    fading_BcGXq = (x_BcGrqP * to_end_BcGrq[..., None]).transpose(-1, -2).reshape(batch, chunks, groups, -1, q)
    states_BcGXN = (fading_BcGXq @ B_BcGqN.to(dtype)).float()
    state_BGXN = _initial(initial_BHPN, batch, groups, per_group * width, state_size, states_BcGXN)
    kept_BcGX1 = torch.exp(end_BcGr1).expand(-1, -1, -1, -1, width).reshape(batch, chunks, groups, -1, 1)
    before = []
    # unbind, not indexing, whose backward pass would make a whole tensor of zeros for every chunk
    for added_BGXN, kept_BGX1 in zip(states_BcGXN.unbind(1), kept_BcGX1.unbind(1), strict=True):
        before.append(state_BGXN)
        state_BGXN = torch.addcmul(added_BGXN, kept_BGX1, state_BGXN)
    if initial_BHPN is not None or chunks > 1:
        before_BcGXN = torch.stack(before, dim=1).to(dtype)
        carried_BcGqX = C_BcGqN.to(dtype) @ before_BcGXN.transpose(-1, -2)
        carried_BcGrqP = carried_BcGqX.view(batch, chunks, groups, q, per_group, width).transpose(3, 4)
        y_BcGrqP = torch.addcmul(y_BcGrqP, carried_BcGrqP, torch.exp(l_BcGrq).to(dtype)[..., None])

    y_BLHP = y_BcGrqP.permute(0, 1, 4, 2, 3, 5).reshape(batch, chunks * q, heads, width)[:, :length]
    if D_H is not None:
        y_BLHP = torch.addcmul(y_BLHP, x_BLHP, D_H.to(dtype)[:, None])
    return y_BLHP, state_BGXN.view(batch, heads, width, state_size)


def _within_chunks(x_BcGrqP: Tensor, l_BcGrq: Tensor, B_BcGqN: Tensor, C_BcGqN: Tensor) -> Tensor:
    """``sum_{s <= t} (C_t . B_s) exp(l_t - l_s) x_s`` for the positions t, s of each chunk."""
    q = l_BcGrq.shape[-1]
    later_qq = torch.ones(q, q, dtype=torch.bool, device=l_BcGrq.device).triu(1)
    difference = (l_BcGrq[..., :, None] - l_BcGrq[..., None, :]).masked_fill_(later_qq, float("-inf"))
    scores_BcGqq = C_BcGqN @ B_BcGqN.transpose(-1, -2)
    # masked before the exponential: of a later position the difference is positive and could overflow
    mixed_BcGrqq = difference.exp_().to(x_BcGrqP.dtype) * scores_BcGqq[:, :, :, None].to(x_BcGrqP.dtype)
    return mixed_BcGrqq @ x_BcGrqP


def _initial(initial_BHPN: Tensor | None, batch: int, groups: int, rows: int, size: int, like: Tensor) -> Tensor:
    if initial_BHPN is None:
        return like.new_zeros(batch, groups, rows, size)
    return initial_BHPN.float().reshape(batch, groups, rows, size)


def ssd_step(
    state_BHPN: Tensor, x_BHP: Tensor, a_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, D_H: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One position of the recurrence: output ``(B, H, P)`` and the new state."""
    per_group = x_BHP.shape[1] // B_BGN.shape[1]
    B_BHN, C_BHN = (value.repeat_interleave(per_group, dim=1) for value in (B_BGN, C_BGN))
    keep_BH = torch.exp(a_BH.float() * A_H.float())
    added = torch.einsum("bhp,bhn->bhpn", x_BHP.float() * a_BH.float()[..., None], B_BHN.float())
    state = state_BHPN.float() * keep_BH[..., None, None] + added
    y_BHP = torch.einsum("bhpn,bhn->bhp", state, C_BHN.float())
    if D_H is not None:
        y_BHP = y_BHP + D_H.float()[:, None] * x_BHP.float()
    return y_BHP.to(x_BHP.dtype), state
