"""Filters of logits, and which positions a confidence-ordered decoder keeps masked.

Filtered tokens get the most negative finite number, not -inf: with a filter on both sides of a difference, or a float16
accumulation, infinities would turn into NaN.

Dimensions: B rows, L positions, V vocabulary; any leading dimensions where a name has none.
"""

import torch
from torch import Tensor

from common.errors import ConfigError


def require_top_p(p: float, option: str = "top_p") -> None:
    """Raises ConfigError unless ``p`` lies in (0, 1]."""
    if not 0 < p <= 1:
        raise ConfigError(f"{option}={p} must lie in (0, 1]; 1 keeps every token.")


def top_p_filter(logits: Tensor, p: float) -> Tensor:
    """Logits of the nucleus: a token stays while the mass of the better ones is at most ``p``, so one always stays.

    Args:
        logits: ``(..., V)``.
        p: in (0, 1]. At 1 nothing is dropped (a float32 sum that rounds above 1 would drop the rarest tokens).

    Source: specification 5.2. Raises: ConfigError for p outside its range.
    """
    require_top_p(p)
    if p == 1:
        return logits
    sorted_logits, order = logits.sort(dim=-1, descending=True)
    mass = sorted_logits.softmax(-1).cumsum(-1)
    before = torch.cat([torch.zeros_like(mass[..., :1]), mass[..., :-1]], dim=-1)
    drop = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before > p)
    return logits.masked_fill(drop, torch.finfo(logits.dtype).min)


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """Logits of the ``k`` likeliest tokens; ties with the last of them stay as well.

    Raises: ConfigError for k < 1. More than V keeps all.
    """
    if k < 1:
        raise ConfigError(f"top_k={k} must be at least 1.")
    least_kept = logits.topk(min(int(k), logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least_kept, torch.finfo(logits.dtype).min)


def lowest_k(scores: Tensor, k: Tensor | int, u: Tensor | None = None, temp: float = 1.0) -> Tensor:
    """True where a score is strictly below the (k + 1)-th smallest of its row; ties there give fewer than k.

    Args:
        scores: ``(B, L)``.
        k: ``(B, 1)``, ``(B,)`` or one number, from 0; L or more marks the whole row.
        u: uniforms ``(B, L)``: ``temp`` times Gumbel noise of them is added to the scores first.
        temp: scale of that noise.

    Source: specification 5.3; golden case ``filters``.
    """
    if u is not None:
        scores = scores + temp * -torch.log(-torch.log(u + 1e-8) + 1e-8)
    k_B1 = torch.as_tensor(k, device=scores.device).reshape(-1, 1).expand(len(scores), 1)
    ends = torch.full_like(scores[:, :1], torch.inf)
    cutoff_B1 = torch.cat([scores.sort(dim=-1).values, ends], dim=-1).gather(-1, k_B1.clamp_max(scores.shape[-1]))
    return scores < cutoff_B1
