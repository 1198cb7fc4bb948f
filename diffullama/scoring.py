"""Scores of candidate continuations: the diffusion bound per token, and the autoregressive parent's likelihood.

A multiple-choice item is a prefix and some continuations; the lowest score wins. Everything that an item needs, and
several items together, goes through the network as one list of partly masked rows, padded only where rows of different
length meet. Continuations of one item share their random numbers, aligned at their ends, so that what differs between
two scores is the text and not the masks.

Dimensions: C continuations of an item, T noise levels, M replicates, l tokens of a continuation, L tokens of prefix
and continuation, R network rows, P scored positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import require_at_least, require_choice
from common.errors import ConfigError, DataError
from common.evaluation.perplexity import (
    SWEEP_SIZE,
    MaskedRows,
    TokenNLL,
    enumeration_rows,
    evaluate_rows,
    join_rows,
    sweep_rows,
)
from common.seeding import generator
from diffullama.model import DiffusionLM

ESTIMATORS = ("reference", "stratified", "counts")
REDUCTIONS = ("mean", "sum")
PADDING = 0  # any id: padding is invisible and never scored


@dataclass(frozen=True, kw_only=True)
class ScoringRule:
    """How a continuation is scored by diffusion; all but ``reference`` estimate its bound per token without bias.

    Attributes:
        estimator: ``reference`` masks with rates T/T, ..., 1/T and averages the mean loss of the masked tokens, which
            is 0 where none is masked: short continuations score too low, by l / (l + 1) and more. ``stratified`` draws
            one rate in each of the T strata and corrects that factor. ``counts`` masks exact numbers of tokens in
            nested sets, and every set if there are few: the least variance.
        levels: T, network rows per continuation and sample; fewer where equal rows meet, or ``counts`` has all masks.
        samples: independent repetitions; from two on, and always with ``counts``, scores have a standard error.
        by_id: tokens of the text that equal the mask's id count as masked, as in the reference.

    Source: specification 6.1.
    """

    estimator: str = "counts"
    levels: int = 32
    samples: int = 1
    by_id: bool = False

    def __post_init__(self) -> None:
        require_choice("scoring.estimator", self.estimator, ESTIMATORS)
        require_at_least("scoring.levels", self.levels, 1)
        require_at_least("scoring.samples", self.samples, 1)


@dataclass(frozen=True)
class ChoiceItem:
    """Ids of a prefix and of the continuations it is scored with."""

    prefix: Sequence[int]
    continuations: Sequence[Sequence[int]]


@dataclass(frozen=True)
class ChoiceScores:
    """Scores of one item's continuations, lower is better.

    Attributes:
        value_MC: float64, independent estimates; one row if there is no randomness, or no repetition.
    """

    value_MC: Tensor

    @property
    def scores_C(self) -> Tensor:
        return self.value_MC.mean(dim=0)

    @property
    def best(self) -> int:
        """The continuation with the lowest score; the first of equals."""
        return int(self.scores_C.argmin())

    def margin(self) -> tuple[float, float | None]:
        """Distance of the second best from the best, and its standard error over replicates (None for a single one).

        Masks are common to the continuations, so this error is smaller than those of the two scores.
        """
        if self.value_MC.shape[1] < 2:
            return float("inf"), None
        first, second = self.scores_C.topk(2, largest=False).indices.tolist()
        difference_M = self.value_MC[:, second] - self.value_MC[:, first]
        count = len(difference_M)
        return float(difference_M.mean()), float(difference_M.std()) / count**0.5 if count > 1 else None


# ---------------------------------------------------------------- by diffusion


def choice_scores(
    model: DiffusionLM,
    prefix: Sequence[int] | Tensor,
    continuations: Sequence[Sequence[int] | Tensor],
    T: int = 32,
    u: Tensor | Sequence[Tensor] | None = None,
    *,
    estimator: str = "reference",
    samples: int = 1,
    by_id: bool = True,
    seed: int = 0,
    batch_size: int = 128,
) -> Tensor:
    """Score of every continuation after the prefix, float64 ``(C,)``; the lowest is the model's choice.

    Args:
        prefix: given ids; with shift at least one.
        continuations: candidate ids, none empty.
        T: noise levels.
        u: uniforms of the estimator ``reference``, row 0 belonging to level T: ``(T, n)`` for all continuations, of
            which each takes its last l columns, or one such array per continuation. None: drawn from ``seed``.
        batch_size: network rows per forward pass.
        estimator, samples, by_id: see ``ScoringRule``; the defaults are the reference's.

    Source: specification 6.1.
    """
    rule = ScoringRule(estimator=estimator, levels=T, samples=samples, by_id=by_id)
    item = ChoiceItem(_ids(prefix), [_ids(continuation) for continuation in continuations])
    if u is not None:
        u = [u] * len(item.continuations) if isinstance(u, Tensor) else list(u)
        u = [torch.as_tensor(array).reshape(-1, torch.as_tensor(array).shape[-1]) for array in u]
    (found,) = score_items(model, [item], rule, keys=[0], seed=seed, batch_size=batch_size, uniforms=u)
    return found.scores_C


def score_items(
    model: DiffusionLM,
    items: Sequence[ChoiceItem],
    rule: ScoringRule,
    *,
    keys: Sequence[int],
    seed: int = 0,
    batch_size: int = 128,
    uniforms: Sequence[Tensor] | None = None,
) -> list[ChoiceScores]:
    """Scores of several items, whose rows share forward passes.

    Args:
        keys: numbers of the items; each item's random numbers are drawn from (seed, its key) alone.
        batch_size: network rows per forward pass.
        uniforms: see ``choice_scores``; of a single item.

    Raises: ConfigError for ``uniforms`` that do not fit; DataError for an empty continuation, or with shift an empty
        prefix, or more tokens than the model has positions.
    """
    parts: list[MaskedRows] = []
    owner: list[tuple[int, int, int]] = []  # of every part: item, continuation, replicate
    sequences: list[list[int]] = []
    for place, (item, key) in enumerate(zip(items, keys, strict=True)):
        check_item(model, item)
        for choice, continuation in enumerate(item.continuations):
            tokens = [*item.prefix, *continuation]
            given = uniforms[choice] if uniforms is not None else None
            for replicate, rows in enumerate(_replicates(model, item, tokens, rule, seed, key, given)):
                rows.sequence_R = torch.full((len(rows),), len(sequences))
                parts.append(rows)
                owner.append((place, choice, replicate))
            sequences.append(tokens)
    values = _part_values(model, sequences, parts, batch_size)
    replicates = [1 + max(m for place, _, m in owner if place == index) for index in range(len(items))]
    found = [torch.zeros(count, len(item.continuations), dtype=torch.float64)
             for count, item in zip(replicates, items, strict=True)]  # fmt: skip
    for (place, choice, replicate), value in zip(owner, values.tolist(), strict=True):
        found[place][replicate, choice] = value
    return [ChoiceScores(value_MC) for value_MC in found]


def check_item(model: DiffusionLM, item: ChoiceItem) -> None:
    """Raises DataError for an item that the model cannot score."""
    if model.shift and not item.prefix:
        raise DataError(
            "an item has an empty prefix, but with shift the first position has no prediction; put a "
            "beginning-of-text token before it."
        )
    longest = max((len(continuation) for continuation in item.continuations), default=0)
    if not item.continuations or min(len(continuation) for continuation in item.continuations) < 1:
        raise DataError("an item has no continuation, or an empty one; leave the item out.")
    limit = model.max_length
    if limit is not None and len(item.prefix) + longest > limit:
        raise DataError(
            f"an item has {len(item.prefix) + longest} tokens, but the model {limit} positions; cut its prefix."
        )


def _replicates(
    model: DiffusionLM,
    item: ChoiceItem,
    tokens: list[int],
    rule: ScoringRule,
    seed: int,
    key: int,
    given: Tensor | None,
) -> list[MaskedRows]:
    """The rows of one continuation, positions over the whole sequence; the weights make a row's sum its value."""
    length = len(tokens) - len(item.prefix)
    longest = max(len(continuation) for continuation in item.continuations)
    rng = generator(seed, "choice masks", key)  # anew for every continuation: common random numbers
    if rule.estimator == "counts":
        if given is not None:
            raise ConfigError("u belongs to estimator=reference or stratified; counts draws orders, from its seed.")
        return _count_replicates(len(tokens), length, longest, rule, rng)
    found = []
    for _ in range(rule.samples):
        level_T = torch.arange(rule.levels, 0, -1, dtype=torch.float64)
        if rule.estimator == "stratified":
            level_T = level_T - torch.rand(1, generator=rng, dtype=torch.float64)
        u_Tn = torch.rand(rule.levels, longest, generator=rng) if given is None else given
        if len(u_Tn) != rule.levels or u_Tn.shape[-1] < length:
            raise ConfigError(
                f"u has shape {tuple(u_Tn.shape)}, but {rule.levels} levels and a continuation of {length} tokens "
                f"need at least ({rule.levels}, {length})."
            )
        masked_TL = torch.zeros(rule.levels, len(tokens), dtype=torch.bool)
        masked_TL[:, len(item.prefix) :] = level_masks(u_Tn[:, -length:], level_T)
        scored_TL = masked_TL
        if rule.by_id:
            scored_TL = masked_TL | (torch.tensor(tokens) == model.mask_id)
            if model.shift:
                scored_TL[:, 0] = False
        weight_TL = scored_TL / (scored_TL.sum(dim=1, keepdim=True).clamp(min=1) * rule.levels)
        if rule.estimator == "stratified":
            weight_TL = weight_TL * ((length + 1) / length)  # a uniform rate masks none of l tokens in 1 of l + 1 draws
        found.append(MaskedRows(torch.zeros(rule.levels, dtype=torch.int64), masked_TL, weight_TL))
    return found


def level_masks(u_Tl: Tensor, level_T: Tensor | None = None) -> Tensor:
    """bool ``(T, l)``: tokens masked at rate level / T, by default at the reference's levels T, ..., 1."""
    levels = len(u_Tl)
    level_T = torch.arange(levels, 0, -1, dtype=torch.float64) if level_T is None else level_T
    return u_Tl < (level_T / levels).to(u_Tl.dtype)[:, None]


def _count_replicates(
    total: int, length: int, longest: int, rule: ScoringRule, rng: torch.Generator
) -> list[MaskedRows]:
    """Sweeps over the number of masked tokens; their number is that of the longest continuation, for all of an item."""
    draws = rule.levels * rule.samples
    sweeps = max(-(-draws // SWEEP_SIZE), min(2, draws))
    positions_P = torch.arange(total - length, total)
    is_short = length < 32 and 2**length - 1 <= draws
    found = []
    for sweep in range(sweeps):
        key_n = torch.rand(longest, generator=rng)
        offset_B = torch.rand(1, generator=rng, dtype=torch.float64)
        if is_short:
            rows = enumeration_rows(positions_P, total)
        else:
            rank_BL = torch.full((1, total), -1)
            rank_BL[0, positions_P] = key_n[-length:].argsort().argsort()
            size = min(draws // sweeps + (sweep < draws % sweeps), length)
            rows = sweep_rows(rank_BL, offset_B, size, length=length)
        rows.weight_RL = rows.weight_RL / length  # per token
        found.append(rows)
    return found


def _part_values(
    model: DiffusionLM, sequences: Sequence[list[int]], parts: Sequence[MaskedRows], batch_size: int
) -> Tensor:
    """The sum of every part's rows, float64; equal rows are computed once."""
    x_BL, lengths_B = pad(sequences)
    width = x_BL.shape[1]
    padded = [
        MaskedRows(rows.sequence_R, *(torch.nn.functional.pad(a, (0, width - a.shape[1])) for a in
                                      (rows.masked_RL, rows.weight_RL)))
        for rows in parts
    ]  # fmt: skip
    joined = join_rows(padded)
    part_R = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(rows) for rows in parts]))
    used_R = (joined.weight_RL != 0).any(dim=1)  # nothing masked: the value is 0
    part_R, joined = part_R[used_R], _take(joined, used_R)
    content = torch.cat([joined.sequence_R[:, None].float(), joined.masked_RL.float(), joined.weight_RL], dim=1)
    unique, place_R = content.unique(dim=0, return_inverse=True)
    first_R = torch.full((len(unique),), len(content)).scatter_reduce(
        0, place_R, torch.arange(len(content)), reduce="amin"
    )
    order_R = lengths_B[joined.sequence_R[first_R]].argsort(descending=True, stable=True)
    rows = _take(joined, first_R[order_R])
    value_R = evaluate_rows(
        token_nll(model),
        x_BL.to(model.device),
        rows,
        mask_id=model.mask_id,
        batch_size=batch_size,
        lengths_B=lengths_B,
    )
    value_of_unique = torch.empty(len(unique), dtype=torch.float64)
    value_of_unique[order_R] = value_R
    return torch.zeros(len(parts), dtype=torch.float64).index_add_(0, part_R, value_of_unique[place_R])


def _take(rows: MaskedRows, chosen: Tensor) -> MaskedRows:
    return MaskedRows(rows.sequence_R[chosen], rows.masked_RL[chosen], rows.weight_RL[chosen])


def token_nll(model: DiffusionLM) -> TokenNLL:
    """The network's chunked loss, for ``common/evaluation/perplexity.py``; never holds logits of all positions."""

    def nll(z_RL: Tensor, x_RL: Tensor, where_RL: Tensor, visible_RL: Tensor | None = None) -> Tensor:
        return model(z_RL, x_RL, where_RL, visible=visible_RL)

    return nll


# ---------------------------------------------------------------- by the autoregressive parent


def causal_scores(
    model: DiffusionLM,
    prefix: Sequence[int] | Tensor,
    continuations: Sequence[Sequence[int] | Tensor],
    reduce: str = "mean",
    *,
    batch_size: int = 128,
) -> Tensor:
    """Log-likelihood of every continuation under causal attention, float64 ``(C,)`` in nats; the highest is the choice.

    Args:
        reduce: ``mean`` over the continuation's tokens, or their ``sum``.

    Source: specification 6.2, the baseline.
    """
    item = ChoiceItem(_ids(prefix), [_ids(continuation) for continuation in continuations])
    (found,) = causal_items(model, [item], reduce, batch_size=batch_size)
    return -found.scores_C


def causal_items(
    model: DiffusionLM, items: Sequence[ChoiceItem], reduce: str, *, batch_size: int = 128
) -> list[ChoiceScores]:
    """As ``score_items`` by negative log-likelihood: nothing is random, so there is one replicate."""
    require_choice("reduce", reduce, REDUCTIONS)
    sequences, starts = [], []
    for item in items:
        check_item(model, item)
        if not item.prefix:
            raise DataError("an item has an empty prefix; put a beginning-of-text token before it.")
        for continuation in item.continuations:
            sequences.append([*item.prefix, *continuation])
            starts.append(len(item.prefix))
    nats = causal_nll(model, sequences, starts, batch_size=batch_size)
    if reduce == "mean":
        nats = [value / (len(tokens) - start) for value, tokens, start in zip(nats, sequences, starts, strict=True)]
    found = []
    for item in items:
        taken, nats = nats[: len(item.continuations)], nats[len(item.continuations) :]
        found.append(ChoiceScores(torch.tensor([taken], dtype=torch.float64)))
    return found


@torch.no_grad()
def causal_nll(
    model: DiffusionLM, sequences: Sequence[Sequence[int]], starts: Sequence[int], *, batch_size: int
) -> list[float]:
    """Summed NLL in nats of each sequence's tokens from its start on (at least 1), under causal attention."""
    total = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda index: (-len(sequences[index]), index))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        x_BL, lengths_B = pad([sequences[index] for index in chosen])
        position_L = torch.arange(x_BL.shape[1])
        visible_BL = position_L < lengths_B[:, None]
        where_BL = visible_BL & (position_L >= torch.tensor([starts[index] for index in chosen])[:, None])
        padding = None if bool(visible_BL.all()) else visible_BL.to(model.device)
        nll_P = shifted_nll(model, x_BL.to(model.device), where_BL.to(model.device), padding)
        row_P = where_BL.nonzero()[:, 0]
        sums = torch.zeros(len(chosen), dtype=torch.float64).index_add_(0, row_P, nll_P.double().cpu())
        for index, value in zip(chosen, sums.tolist(), strict=True):
            total[index] = value
    return total


def shifted_nll(model: DiffusionLM, x_BL: Tensor, where_BL: Tensor, visible_BL: Tensor | None = None) -> Tensor:
    """NLL of the tokens at ``where_BL`` under causal attention, each predicted by the position before it."""
    if model.shift:
        return model(x_BL, x_BL, where_BL, visible=visible_BL, causal=True)
    # without shift the model takes the prediction at the position itself: ask there for the next token
    return model(x_BL, x_BL.roll(-1, dims=1), where_BL.roll(-1, dims=1), visible=visible_BL, causal=True)


# ---------------------------------------------------------------- sequences


def pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """``x_BL`` padded on the right, and the lengths."""
    lengths_B = torch.tensor([len(tokens) for tokens in sequences])
    x_BL = torch.full((len(sequences), int(lengths_B.max())), PADDING)
    for row, tokens in enumerate(sequences):
        x_BL[row, : len(tokens)] = torch.as_tensor(list(tokens))
    return x_BL, lengths_B


def _ids(tokens: Sequence[int] | Tensor) -> list[int]:
    return tokens.flatten().tolist() if isinstance(tokens, Tensor) else [int(token) for token in tokens]
