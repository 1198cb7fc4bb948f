"""Sampling of absorbing diffusion step by step over the time grid, as the reference implementation does it.

Slower than ``common/diffusion/absorbing.py`` and of the same law (in float64); kept to reproduce the reference's
trajectories and the effect of its low-precision draws. The network's output is cached: only rows that changed in the
step before are evaluated again, compacted into one batch.

Dimensions: S steps, B sequences, R evaluated sequences, L positions, P masked positions, V vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.diffusion.absorbing import Denoiser, OnLaunch, SampleResult, UniformSource
from common.diffusion.categorical import TokenDraw, draw_tokens, race
from common.diffusion.reveal import GIVEN
from common.diffusion.uniforms import RowUniforms
from common.errors import ConfigError

WEIGHT_DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16-compat": torch.float16}
LAST_STEP_RATE = 1.0 + 1e-3  # the reference's: the weight of staying masked becomes negative, so every token unmasks


@dataclass
class StepwiseResult(SampleResult):
    """A result with the record of its steps; optional parts are empty unless they were asked for.

    Attributes:
        evaluated_SB: whether the network was evaluated for a row in a step.
        changed_SB: whether a row changed in a step.
        states: (S + 1) tensors (B, L): the start, then the state after each step.
        weights: S tensors (B, L, V): one-stage transition weights, zero at visible positions.
        updated: S bool tensors (B, L): positions unmasked in each step.
    """

    evaluated_SB: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.bool))
    changed_SB: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.bool))
    states: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    updated: list[Tensor] = field(default_factory=list)


def sample_stepwise(
    denoise: Denoiser,
    tokens_BL: Tensor,
    rate_S: Tensor,
    *,
    mask_id: int,
    draw: TokenDraw | None = None,
    stages: int | None = None,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    uniforms: UniformSource | None = None,
    cached: bool = True,
    skip_filled: bool = True,
    record: bool = False,
    on_launch: OnLaunch | None = None,
) -> StepwiseResult:
    """Fills the masked positions in S steps.

    Args:
        denoise: the network.
        tokens_BL: ids with ``mask_id`` at the positions to fill.
        rate_S: update probability of each step (``nfe.update_rate``); the last one is forced to one.
        mask_id: the mask.
        draw: how tokens are drawn; its ``precision`` decides how the reference's races are computed.
        stages: 1 draws "stay masked or become v" at once, among V columns (strategy direct only); 2 draws first
            whether, then which. By default 1 for direct and 2 for all others, as in the reference.
        seed: of the per-row generators.
        rows: row numbers, by default 0, 1, ...
        uniforms: random numbers from outside in place of ``seed``; races where its token uniforms have columns.
        cached: whether rows that did not change keep their last predictions; False calls the network in every step.
        skip_filled: whether rows without masked positions are left out; the reference evaluates a row once more after
            its last change.
        record: whether to keep states, weights and updates.
        on_launch: called after every step.

    Returns:
        samples; ``calls_B`` counts evaluations of each row.

    Source: RADD, section 5.1 and 5.2 of the reference's samplers; E-NFE counts the entries of ``changed_SB``.
    """
    draw = draw or TokenDraw()
    stages = stages or (1 if draw.strategy == "direct" and draw.temperature == 1.0 else 2)
    if stages == 1 and (draw.strategy != "direct" or draw.temperature != 1.0):
        raise ConfigError(
            f"one-stage steps need strategy=direct and temperature=1; got strategy={draw.strategy}, "
            f"temperature={draw.temperature}. Use two stages."
        )
    if stages == 2 and draw.precision == "float16-compat":
        raise ConfigError("precision=float16-compat needs strategy=direct and temperature=1; use float64 or float32.")
    row_numbers = torch.arange(len(tokens_BL)) if rows is None else torch.as_tensor(list(rows), dtype=torch.int64)
    uniforms = uniforms or RowUniforms(seed, dtype=draw.dtype, race=stages == 1)

    started = time.perf_counter()
    device = tokens_BL.device
    tokens_BL = tokens_BL.clone()
    revealed_BL = torch.full_like(tokens_BL, GIVEN)
    changed_B = torch.ones(len(tokens_BL), dtype=torch.bool, device=device)
    cache_BLV: Tensor | None = None
    calls_B = torch.zeros(len(tokens_BL), dtype=torch.int64, device=device)
    launches = 0
    result = StepwiseResult(tokens_BL, calls_B, 0, 0.0, len(rate_S))
    evaluated_steps, changed_steps = [], []
    if record:
        result.states.append(tokens_BL.clone())
    for step, rate in enumerate(rate_S.tolist()):
        is_last = step == len(rate_S) - 1
        masked_BL = tokens_BL == mask_id
        evaluated_B = changed_B.clone() if cached else torch.ones_like(changed_B)
        if skip_filled:
            evaluated_B &= masked_BL.any(1)
        if bool(evaluated_B.any()):
            at_B = evaluated_B.nonzero().squeeze(1)
            with torch.no_grad():
                log_probs_PV = denoise(tokens_BL[at_B], masked_BL[at_B])
            if cache_BLV is None:
                cache_BLV = log_probs_PV.new_full((*tokens_BL.shape, log_probs_PV.shape[-1]), -torch.inf)
            where_BL = masked_BL & evaluated_B.unsqueeze(1)
            cache_BLV[where_BL] = log_probs_PV
            calls_B += evaluated_B
            launches += 1
        row_P, position_P = masked_BL.nonzero(as_tuple=True)
        index_P = (torch.full((len(row_P),), step), row_numbers[row_P.cpu()], position_P.cpu())
        drawn_P = torch.full_like(row_P, mask_id)
        weights_PV = None
        if len(row_P) and stages == 1:
            log_probs_PV = cache_BLV[row_P, position_P]
            weights_PV = transition_weights(log_probs_PV, LAST_STEP_RATE if is_last else rate, mask_id, draw.precision)
            uniform_PV = uniforms.token(*index_P, log_probs_PV.shape[-1]).to(device)
            drawn_P = race(weights_PV.float() if draw.precision == "float16-compat" else weights_PV, uniform_PV)
        elif len(row_P):
            update_P = uniforms.update(*index_P).to(device) < rate
            if is_last:
                update_P = torch.ones_like(update_P)
            if bool(update_P.any()):
                log_probs_PV = cache_BLV[row_P[update_P], position_P[update_P]]
                at_P = update_P.cpu()
                uniform = uniforms.token(*(index[at_P] for index in index_P), log_probs_PV.shape[-1]).to(device)
                drawn_P[update_P] = draw_tokens(log_probs_PV, uniform, draw)
        tokens_BL[row_P, position_P] = drawn_P
        updated_BL = masked_BL & (tokens_BL != mask_id)
        revealed_BL[updated_BL] = step
        changed_B = updated_BL.any(1)
        evaluated_steps.append(evaluated_B.cpu())
        changed_steps.append(changed_B.cpu())
        if record:
            result.states.append(tokens_BL.clone())
            result.updated.append(updated_BL)
            if stages == 1:
                weights_BLV = cache_BLV.new_zeros(cache_BLV.shape, dtype=WEIGHT_DTYPES[draw.precision])
                if weights_PV is not None:
                    weights_BLV[row_P, position_P] = weights_PV
                result.weights.append(weights_BLV)
        if on_launch is not None:
            on_launch(row_numbers, tokens_BL)
        if skip_filled and not record and not bool((tokens_BL == mask_id).any()):
            break
    result.tokens_BL, result.calls_B, result.revealed_BL = tokens_BL, calls_B.cpu(), revealed_BL.cpu()
    result.launches, result.seconds = launches, time.perf_counter() - started
    result.evaluated_SB, result.changed_SB = torch.stack(evaluated_steps), torch.stack(changed_steps)
    return result


def transition_weights(log_probs_PV: Tensor, rate: float, mask_id: int, precision: str) -> Tensor:
    """One-stage weights of a masked position: ``rate * c_v`` for token v, ``1 - rate`` for staying masked.

    With ``float16-compat`` both the cached probabilities and the products are half precision, in which anything below
    3e-8 is zero: the reference's arithmetic, which silences rare tokens more the more steps there are.
    """
    dtype = WEIGHT_DTYPES[precision]
    weights_PV = log_probs_PV.to(torch.float32 if precision == "float16-compat" else dtype).exp().to(dtype) * rate
    weights_PV[:, mask_id] = 1.0 - rate
    return weights_PV
