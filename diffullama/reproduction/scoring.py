"""Numbers of a trained network on the held-out blocks: bound, single hidden tokens, hidden spans, infilled texts.

Everything is per block, so that two networks can be compared block by block. The first token of a block is given in
every number: with shift it has no prediction, and the AR network has no context for it.

Dimensions: B blocks, L positions, K positions of a block that are hidden one at a time, P hidden positions.
"""

import numpy as np
import torch
from torch import Tensor

from common.diffusion.categorical import TokenDraw
from common.evaluation.metric import mean_metric
from common.evaluation.perplexity import GROUP_SIZE, combine
from common.seeding import generator
from diffullama.autoregressive import continue_causally
from diffullama.model import DiffusionLM
from diffullama.nelbo import Span, causal_nats, group_bound, nelbo, span_nll
from diffullama.reproduction.settings import Settings
from diffullama.reproduction.training import blocks, load_model, tokenizer
from diffullama.sampler import fill

GIVEN = 1  # first tokens of a block that are never scored
GREEDY = TokenDraw(strategy="greedy")


def measured(values: list[float] | np.ndarray) -> dict:
    """Mean over blocks, its standard error over blocks, and the blocks themselves for paired comparisons."""
    found = mean_metric("", torch.as_tensor(np.asarray(values)))
    return {"mean": found.value, "error": found.standard_error, "blocks": [round(float(v), 6) for v in values]}


def bound(model: DiffusionLM, x_BL: Tensor, *, draws: int, seed: int) -> dict:
    """The bound in nats per token with the error of its random masks; the same masks for every network."""
    groups = [
        group_bound(
            model,
            x_BL[first : first + GROUP_SIZE],
            first,
            estimator="count",
            draws=draws,
            seed=seed,
            batch_size=64,
            given=GIVEN,
        )
        for first in range(0, len(x_BL), GROUP_SIZE)
    ]
    scored = x_BL.shape[1] - GIVEN
    total = combine(groups, scored).nats_per_token
    per_block = [nats / scored for group in groups for nats in group.nats]
    return {**measured(per_block), "mask_error": total.standard_error}


def cloze_positions(settings: Settings, count: int) -> Tensor:
    """K different positions of each block, drawn from a fixed seed: the same for all networks and runs."""
    rng = generator(0, "reproduction cloze")
    keys_BL = torch.rand(count, settings.length - GIVEN, generator=rng)
    return keys_BL.argsort(dim=1)[:, : settings.cloze_positions] + GIVEN


@torch.no_grad()
def cloze(model: DiffusionLM, x_BL: Tensor, position_BK: Tensor, *, causal: bool) -> dict:
    """Cross-entropy and top-1 accuracy of single hidden tokens; ``causal``: from the left context only."""
    nll, hits = [], []
    for position_B in position_BK.T:
        where_BL = torch.zeros_like(x_BL, dtype=torch.bool)
        where_BL[torch.arange(len(x_BL)), position_B] = True
        z_BL = x_BL if causal else x_BL.masked_fill(where_BL, model.mask_id)
        # one hidden token a block, so row-major order is the order of the blocks
        log_PV = _log_probs(model, z_BL, where_BL, causal)
        target_P = x_BL[where_BL]
        nll.append(-log_PV.gather(1, target_P[:, None]).squeeze(1).double().numpy())
        hits.append((log_PV.argmax(dim=1) == target_P).double().numpy())
    return {"nll": measured(np.mean(nll, axis=0)), "accuracy": measured(np.mean(hits, axis=0))}


def _log_probs(model: DiffusionLM, z_BL: Tensor, where_BL: Tensor, causal: bool, rows: int = 64) -> Tensor:
    parts = []
    for first in range(0, len(z_BL), rows):
        part = slice(first, first + rows)
        parts.append(model(z_BL[part], where=where_BL[part], causal=causal))
    return torch.cat(parts)


def spans(model: DiffusionLM, x_BL: Tensor, settings: Settings) -> dict:
    """Mean loss of hidden spans, with the true suffix and with the suffix hidden as well, and the paired difference."""
    found: dict[str, list[np.ndarray]] = {"with_suffix": [], "without_suffix": []}
    for start in settings.span_starts:
        for kind, values in span_nll(model, x_BL, Span(start, settings.span)).items():
            found[kind].append(np.array(values))
    mean = {kind: np.mean(values, axis=0) for kind, values in found.items()}
    gain = mean["without_suffix"] - mean["with_suffix"]
    return {**{kind: measured(values) for kind, values in mean.items()}, "gain": measured(gain)}


def infill(model: DiffusionLM, x_BL: Tensor, settings: Settings, *, causal: bool, seed: int) -> tuple[Tensor, dict]:
    """Blocks whose middle span was written by the network, and how much of it is right.

    Greedy in order of confidence, one token per call; ``causal``: greedy continuation of the prefix.
    """
    span = Span.middle(settings.length, settings.span)
    inside = slice(span.start, span.start + span.length)
    written_BL = x_BL.clone()
    if causal:
        written_BL[:, inside] = continue_causally(model, x_BL[:, : span.start], span.length, draw=GREEDY)
    else:
        given_BL = torch.ones_like(x_BL, dtype=torch.bool)
        given_BL[:, inside] = False
        result = fill(model, x_BL, given_BL, order="confidence", draw=GREEDY, seed=seed, max_rows=64)
        written_BL = result.tokens_BL
    right_B = (written_BL == x_BL)[:, inside].double().mean(dim=1)
    masks = int((written_BL == settings.mask_id).sum())
    changed = int((written_BL != x_BL).sum() - (written_BL != x_BL)[:, inside].sum())
    return written_BL, {"accuracy": measured(right_B.numpy()), "masks": masks, "changed_outside": changed}


def score(run_dir: str, cache_dir: str, seed: int, settings: dict, arm: str) -> dict:
    """All numbers of one arm."""
    settings = Settings.from_dict(settings)
    chosen = settings.arm(arm)
    model = load_model(run_dir, settings, chosen)
    x_BL = blocks(settings, "test", cache_dir, settings.test_blocks)
    causal = chosen.kind == "ar"
    if causal:
        found: dict = {"bound": measured(np.array(causal_nats(model, x_BL)) / (settings.length - GIVEN))}
    else:
        found = {"bound": bound(model, x_BL, draws=settings.draws, seed=seed)}
        by_time = nelbo(model, x_BL, "time", draws=settings.draws, seed=seed, given=GIVEN)
        found["bound_by_time"] = {"mean": by_time.value, "error": by_time.standard_error}
        found["spans"] = spans(model, x_BL, settings)
    found["cloze"] = cloze(model, x_BL, cloze_positions(settings, len(x_BL)), causal=causal)
    gap_BL = x_BL[: settings.infill_blocks]
    written_BL, found["infill"] = infill(model, gap_BL, settings, causal=causal, seed=seed)
    found["texts"] = texts(settings, cache_dir, gap_BL, written_BL)
    return found


def texts(settings: Settings, cache_dir: str, x_BL: Tensor, written_BL: Tensor) -> list[dict[str, str]]:
    """Prefix, written span, true span and suffix of a few blocks, as text."""
    made = tokenizer(settings, cache_dir)
    span = Span.middle(settings.length, settings.span)
    end = span.start + span.length
    step = max(1, len(x_BL) // settings.shown)
    return [
        {
            "prefix": made.decode(true_L[: span.start]),
            "written": _decode(made, written_L[span.start : end], settings.mask_id),
            "true": made.decode(true_L[span.start : end]),
            "suffix": made.decode(true_L[end:]),
        }
        for true_L, written_L in list(zip(x_BL, written_BL, strict=True))[::step][: settings.shown]
    ]


def _decode(made, ids: Tensor, mask_id: int) -> str:
    """Text of ids, a mask spelled out: one in an infilled text is an error that the report must show."""
    return "".join("[MASK]" if token == mask_id else made.decode([token]) for token in ids.tolist())


def untrained(settings: dict, cache_dir: str, seed: int, parent_dir: str) -> dict:
    """Where adaptation starts: the AR network's own bound under full attention, before any diffusion step."""
    settings = Settings.from_dict(settings)
    model = load_model(parent_dir, settings, settings.arm("adapt"))
    x_BL = blocks(settings, "test", cache_dir, settings.held_out_blocks)
    return {"bound": bound(model, x_BL, draws=settings.draws, seed=seed)}
