"""Parallel decoding in an order that depends on the predictions: confidence, margin, entropy, threshold.

Each call predicts all masked positions of a row (or of its current block), draws a candidate token at each, and keeps
the candidates that a ``SelectionRule`` picks. Orders that do not look at predictions are plans and cheaper
(``common/diffusion/absorbing.py``). Not the law of the diffusion: filling several positions at once treats them as
independent, and choosing by confidence favours likely tokens.

Dimensions: R sequences in flight, L positions, P masked positions, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from common.diffusion.absorbing import (
    Denoiser,
    FinishedRow,
    OnLaunch,
    RowDenoiser,
    RowsInFlight,
    SampleResult,
    UniformSource,
    collect,
    predict,
)
from common.diffusion.categorical import TokenDraw, draw_tokens
from common.diffusion.orders import SelectionRule, entropy, score_positions, select
from common.diffusion.reveal import AFTER_STOP, GIVEN
from common.diffusion.stopping import StopRule
from common.diffusion.uniforms import RowUniforms
from common.errors import ConfigError

WAITING = torch.iinfo(torch.int64).max  # event of a position that is still to be filled


def run_selection(
    denoise: Denoiser | RowDenoiser,
    pages: Iterable[tuple[Tensor, ...]],
    rule: SelectionRule,
    *,
    mask_id: int,
    draw: TokenDraw | None = None,
    seed: int = 0,
    uniforms: UniformSource | None = None,
    block_length: int | None = None,
    max_rows: int | None = None,
    device: torch.device | str | None = None,
    stop: StopRule | None = None,
    on_launch: OnLaunch | None = None,
) -> Iterator[FinishedRow]:
    """Yields every row as it is completed.

    Args:
        pages: (index_B, tokens_BL) or (index_B, tokens_BL, free_BL): row numbers, ids with ``mask_id`` at the positions
            to fill, and those positions where ``mask_id`` may be given as well.
        rule: which candidates each call keeps. With ``block_length`` its counts are those of one block.
        uniforms: in place of per-row generators; steps are the row's calls. ``update`` feeds random order and noise.
        block_length: fills blocks of so many positions from left to right.

    Other arguments as in ``absorbing.run_events``.
    """
    draw = draw or TokenDraw()
    if block_length is not None and block_length < 1:
        raise ConfigError(f"block_length={block_length} must be at least 1; null fills the whole sequence at once.")
    own = RowUniforms(seed) if uniforms is None else None
    source = own or uniforms

    def fields() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for index_B, tokens_BL, *free in pages:
            tokens_BL = tokens_BL.to(device or tokens_BL.device)
            none_B = torch.zeros_like(index_B)
            free_BL = free[0].to(tokens_BL.device) if free else tokens_BL == mask_id
            event_BL = torch.where(free_BL, WAITING, GIVEN)
            yield (
                index_B,
                {"tokens": tokens_BL, "event": event_BL, "block": none_B - 1, "call": none_B, "total": none_B},
            )

    rows = RowsInFlight(
        fields(),
        max_rows,
        evaluations_per_call=getattr(denoise, "evaluations_per_call", 1),
        fill_id=None if stop is None else stop.fill_id,
    )
    launches = 0
    while True:
        rows.refill()
        if not len(rows):
            return
        tokens_RL, event_RL = rows.fields["tokens"], rows.fields["event"]
        masked_RL = event_RL == WAITING
        done_R = ~masked_RL.any(1).cpu()
        if bool(done_R.any()):
            for row in rows.retire(done_R, launches):
                if own is not None:
                    own.forget(row.index)
                yield row
            continue
        block_of_L = torch.arange(tokens_RL.shape[1], device=tokens_RL.device) // (block_length or tokens_RL.shape[1])
        block_R = masked_RL.long().argmax(1) // (block_length or tokens_RL.shape[1])
        candidates_RL = masked_RL & (block_of_L == block_R.unsqueeze(1))
        is_new_R = block_R.cpu() != rows.fields["block"]
        total_R = torch.where(is_new_R, candidates_RL.sum(1).cpu(), rows.fields["total"])
        call_R = torch.where(is_new_R, 0, rows.fields["call"])
        with torch.no_grad():
            log_probs_PV = predict(denoise, tokens_RL, candidates_RL, rows.index_R, event_RL == GIVEN)
        row_P, position_P = candidates_RL.nonzero(as_tuple=True)
        index_P = (rows.calls_R[row_P.cpu()], rows.index_R[row_P.cpu()], position_P.cpu())
        uniform = source.token(*index_P, log_probs_PV.shape[-1]).to(log_probs_PV.device)
        drawn_P = draw_tokens(log_probs_PV, uniform, draw)
        uniform_P = None
        if rule.order == "random" or rule.noise:
            uniform_P = source.update(*index_P).to(log_probs_PV.device)
        score_P = score_positions(rule.order, log_probs_PV, drawn_P, position_P, uniform_P)
        if rule.noise:
            score_P = score_P - rule.noise * torch.log(-torch.log(uniform_P.double().clamp(1e-300, 1 - 2.0**-53)))
        at_RL = torch.zeros_like(candidates_RL, dtype=torch.float64)
        chosen_RL = select(
            rule,
            score_RL=at_RL.masked_scatter(candidates_RL, score_P),
            log_probability_RL=at_RL.masked_scatter(
                candidates_RL, log_probs_PV.gather(-1, drawn_P.unsqueeze(-1)).squeeze(-1).double()
            ),
            entropy_RL=at_RL
            if rule.entropy_bound is None
            else at_RL.masked_scatter(candidates_RL, entropy(log_probs_PV).double()),
            candidates_RL=candidates_RL,
            counts_R=None
            if rule.per_call is None and rule.steps is None
            else rule.counts(call_R, total_R).to(tokens_RL.device),
        )
        kept_P = chosen_RL[candidates_RL]
        tokens_RL[chosen_RL] = drawn_P[kept_P]
        event_RL[chosen_RL] = rows.calls_R.to(event_RL.device).unsqueeze(1).expand_as(event_RL)[chosen_RL]
        if stop is not None:
            waiting_RL = event_RL == WAITING
            event_RL[waiting_RL & stop.behind(tokens_RL, (event_RL >= 0) & ~waiting_RL)] = AFTER_STOP
        rows.fields |= {"block": block_R.cpu(), "call": call_R + 1, "total": total_R}
        rows.calls_R += 1
        launches += 1
        if on_launch is not None:
            on_launch(rows.index_R, tokens_RL)


def sample_by_selection(
    denoise: Denoiser,
    tokens_BL: Tensor,
    rule: SelectionRule,
    *,
    mask_id: int,
    rows: Sequence[int] | None = None,
    **options: object,
) -> SampleResult:
    """Fills the masked positions of one batch by ``rule``; ``options`` are those of ``run_selection``."""
    index_B = torch.arange(len(tokens_BL)) if rows is None else torch.as_tensor(list(rows), dtype=torch.int64)
    finished = run_selection(denoise, [(index_B, tokens_BL)], rule, mask_id=mask_id, **options)
    return collect(finished, index_B, tokens_BL, rule.steps)
