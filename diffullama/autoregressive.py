"""Continuations by the autoregressive parent: one token after the other under causal attention, with a cache.

The baseline of the generation tasks. Written out, because the library's ``generate`` would follow a saved model's
``is_causal=False``.

Dimensions: B sequences of one length, L tokens of a prefix, n new tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.diffusion.categorical import TokenDraw, draw_tokens
from common.diffusion.uniforms import RowUniforms
from common.errors import ConfigError
from diffullama.model import DiffusionLM


@torch.no_grad()
def continue_causally(
    model: DiffusionLM,
    prefix_BL: Tensor,
    count: int,
    *,
    draw: TokenDraw | None = None,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    stop_id: int | None = None,
) -> Tensor:
    """New ids ``(B, n)`` after the prefixes, greedy by default.

    Args:
        count: n, at least 1.
        draw: how a token is drawn.
        rows: numbers of the sequences; a row's random numbers come from (seed, its number).
        stop_id: token that ends a row; it fills the rest, and all rows ended stop the loop.

    Raises: ConfigError for a prefix that is empty, or too long for the model's positions with n tokens more.
    """
    draw = draw or TokenDraw(strategy="greedy")
    batch, length = prefix_BL.shape
    limit = model.max_length
    if length < 1 or count < 1 or (limit is not None and length + count > limit):
        raise ConfigError(
            f"a prefix of {length} tokens cannot be continued by {count} tokens: both must be at least 1, and the "
            f"model has {limit} positions."
        )
    row_B = torch.arange(batch) if rows is None else torch.as_tensor(list(rows), dtype=torch.int64)
    source = RowUniforms(seed)
    new_BN = torch.full((batch, count), 0 if stop_id is None else stop_id, device=prefix_BL.device)
    ended_B = torch.zeros(batch, dtype=torch.bool, device=prefix_BL.device)
    tokens_BL, cache = prefix_BL, None
    for step in range(count):
        output = model.hf.base_model(
            input_ids=tokens_BL, past_key_values=cache, use_cache=True, is_causal=True, return_dict=True
        )
        cache = output.past_key_values
        logits_BV = model.hf.get_output_embeddings()(output.last_hidden_state[:, -1]).float()
        at = (torch.full_like(row_B, step), row_B, torch.full_like(row_B, length + step))
        uniform_B = source.token(*at, logits_BV.shape[-1]).to(logits_BV.device)
        token_B = draw_tokens(logits_BV, uniform_B, draw)
        new_BN[:, step] = torch.where(ended_B, new_BN[:, step], token_B)
        if stop_id is not None:
            ended_B |= token_B == stop_id
            if bool(ended_B.all()):
                break
        tokens_BL = new_BN[:, step : step + 1]
    return new_BN
