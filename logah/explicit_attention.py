"""Attention with a visible softmax, for tracing: fused kernels leave no softmax in the autograd graph.

Dimensions: heads and batch are leading axes; L queries, S keys, E width of a head.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

_PATCH = threading.Lock()


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q k^T / sqrt(E) + mask) v, the signature of ``scaled_dot_product_attention``."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    logits = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        future_LS = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(future_LS, -torch.inf)
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    weights = torch.softmax(logits, -1)
    return (torch.dropout(weights, dropout_p, True) if dropout_p else weights) @ value


@contextmanager
def visible_softmax() -> Iterator[None]:
    """Inside, ``torch.nn.functional.scaled_dot_product_attention`` is the explicit formula (one trace at a time)."""
    with _PATCH:
        fused = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = explicit_attention
        try:
            yield
        finally:
            F.scaled_dot_product_attention = fused
