"""Likelihood bounds of masked-token models by Monte-Carlo, for any denoiser, with little variance per forward pass.

A model that predicts masked tokens bounds the negative log-likelihood of a sequence of L tokens by

    sum_{k=1}^{L} S_k / k,    S_k = E[summed NLL of the masked tokens | k uniformly random positions are masked]

which is also the mean over random orders of revealing the tokens one by one. Every estimator here is a list of
*replicates*, each an unbiased estimate made of a few network rows: partly masked copies of the sequences with a weight
per scored position. ``sweep_rows`` is the low-variance one.

Everything random is drawn per group of sequences and per sequence, never per forward pass, so neither the batch size
nor the number of processes changes a result beyond rounding.

Dimensions: B sequences of a group, L positions, R rows (masked copies), P scored positions in row-major order, M
replicates, S rows of one sweep.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from common.config import require_at_least
from common.errors import ConfigError
from common.evaluation.metric import Metric, mean_metric, perplexity_metric
from common.seeding import generator

Denoiser = Callable[[Tensor, Tensor], Tensor]
TokenNLL = Callable[..., Tensor]
"""``nll(z_RL, x_RL, where_RL) -> nll_P``: float32 nats of the tokens ``x_RL[where_RL]`` predicted from ``z_RL``. With
padded rows there is a fourth argument ``visible_RL`` (bool), outside of which nothing may be attended to."""

SWEEP_SIZE = 16  # counts per sweep; measured: longer sweeps share one order for too many contexts
GROUP_SIZE = 16  # sequences that share strata; the reference's default batch
_ROWS_AHEAD = 8  # forward passes whose rows are prepared together, so that few passes are partly filled


def nll_of(denoise: Denoiser) -> TokenNLL:
    """Token NLLs from a denoiser ``denoise(tokens_RL, where_RL) -> log_probs_PV``."""

    def nll(z_RL: Tensor, x_RL: Tensor, where_RL: Tensor) -> Tensor:
        return -denoise(z_RL, where_RL).gather(1, x_RL[where_RL][:, None]).squeeze(1)

    return nll


@dataclass
class MaskedRows:
    """Network rows of one replicate for a group of sequences.

    The replicate's estimate for a sequence is the sum over its rows of ``offset + sum_i weight_i * nll_i``.

    Attributes:
        sequence_R: which of the group's sequences a row is a copy of.
        masked_RL: bool, the positions that hold the mask.
        weight_RL: float32, zero except at scored positions, which must be masked.
        offset_R: float32 or None (zero).
    """

    sequence_R: Tensor
    masked_RL: Tensor
    weight_RL: Tensor
    offset_R: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sequence_R)


# ---------------------------------------------------------------- which rows


def sweep_counts(length: int, size: int, offset: float) -> Tensor:
    """``size`` strictly increasing mask counts in 1..length, int64: systematic sampling of the uniform law.

    Args:
        size: S, at most ``length``; with S = length every count appears once.
        offset: in [0, 1); uniform, it makes every count equally likely over the sweep.
    """
    assert 1 <= size <= length
    grid_S = (torch.arange(size, dtype=torch.float64) + offset) * (length / size)
    return grid_S.long().clamp(max=length - 1) + 1


def sweep_rows(
    order_BL: Tensor, offset_B: Tensor, size: int, *, count_weight_L: Tensor | None = None, length: int | None = None
) -> MaskedRows:
    """One sweep of each sequence: S nested masks from one random order, every position scored at most once.

    Row j masks the last k_j positions to be revealed and scores those that row j - 1 has not scored, with weight
    ``l / (S * scored)``. Given its mask, a row's scored positions are a uniformly random part of it, so the estimate is
    unbiased; systematic counts remove the variance between counts, and scoring each position once removes that between
    easy and hard tokens. Scoring few positions also spares the network's head.

    Args:
        order_BL: rank of every position in a uniformly random order, 0 revealed last; -1 for positions that are never
            masked (a prompt). The ranks of a row are 0..l-1.
        offset_B: in [0, 1), each uniform.
        size: S, at most l.
        count_weight_L: factor of the rows with k = 1..l masked positions; None: 1, the exact bound.
        length: l; None: L.
    """
    batch, positions = order_BL.shape
    length = positions if length is None else length
    counts_BS = torch.stack([sweep_counts(length, size, float(offset)) for offset in offset_B])
    previous_BS = torch.cat([torch.zeros_like(counts_BS[:, :1]), counts_BS[:, :-1]], dim=1)
    weight_BS = length / (size * (counts_BS - previous_BS).double())
    if count_weight_L is not None:
        weight_BS = weight_BS * count_weight_L.double()[counts_BS - 1]
    rank_BSL = order_BL[:, None]
    masked_BSL = (rank_BSL >= 0) & (rank_BSL < counts_BS[..., None])
    scored_BSL = masked_BSL & (rank_BSL >= previous_BS[..., None])
    weight_BSL = torch.where(scored_BSL, weight_BS[..., None], 0.0)
    return MaskedRows(
        torch.arange(batch).repeat_interleave(size),
        masked_BSL.reshape(-1, positions),
        weight_BSL.reshape(-1, positions).float(),
    )


def enumeration_rows(position_P: Tensor, positions: int) -> MaskedRows:
    """All masks over the given positions of one sequence, weighted so that their sum is the exact bound.

    Costs 2^P - 1 rows: one for a single position.
    """
    count = len(position_P)
    masks = [subset for k in range(1, count + 1) for subset in combinations(range(count), k)]
    masked_RL = torch.zeros(len(masks), positions, dtype=torch.bool)
    weight_R = torch.empty(len(masks))
    for row, subset in enumerate(masks):
        masked_RL[row, position_P[list(subset)]] = True
        weight_R[row] = 1.0 / (len(subset) * math.comb(count, len(subset)))
    return MaskedRows(torch.zeros(len(masks), dtype=torch.int64), masked_RL, masked_RL * weight_R[:, None])


def order_rows(order_BL: Tensor) -> MaskedRows:
    """The exact NLL of revealing each sequence in an order: L rows per sequence, each scoring one position.

    Args:
        order_BL: permutations; ``order_BL[b, s]`` is the position revealed in step s.
    """
    batch, length = order_BL.shape
    step_BL = order_BL.argsort(dim=1)
    step_L = torch.arange(length)
    masked_BLL = step_BL[:, None] >= step_L[None, :, None]
    scored_BLL = step_BL[:, None] == step_L[None, :, None]
    return MaskedRows(
        torch.arange(batch).repeat_interleave(length),
        masked_BLL.reshape(-1, length),
        scored_BLL.reshape(-1, length).float(),
    )


def sweep_sizes(draws: int, length: int) -> list[int]:
    """Rows of each of the sweeps that ``draws`` rows per sequence are divided into.

    About ``SWEEP_SIZE`` each, and at least two where possible, because their spread gives the standard error.

    Raises: ConfigError for fewer than one draw.
    """
    require_at_least("draws", draws, 1)
    longest = min(SWEEP_SIZE, length)
    sweeps = max(math.ceil(draws / longest), min(2, draws))
    return [draws // sweeps + (index < draws % sweeps) for index in range(sweeps)]


def sweep_replicates(
    first: int,
    batch: int,
    length: int,
    *,
    draws: int,
    seed: int,
    count_weight_L: Tensor | None = None,
    given: int = 0,
) -> Iterator[MaskedRows]:
    """The low-variance estimator's replicates for sequences ``first .. first + batch - 1`` of the test set.

    Offsets of the group's sequences are stratified; orders come from a generator per sequence.

    Args:
        length: tokens of a sequence that are scored.
        draws: network rows per sequence.
        count_weight_L: see ``sweep_rows``.
        given: tokens before them that stay visible, for example a beginning-of-text token.
    """
    order_rng = [generator(seed, "sweep order", first + index) for index in range(batch)]
    offset_rng = generator(seed, "sweep offset", first)
    for size in sweep_sizes(draws, length):
        order_BL = torch.stack([torch.randperm(length, generator=rng) for rng in order_rng])
        order_BL = torch.nn.functional.pad(order_BL, (given, 0), value=-1)
        uniform_B = torch.rand(batch, generator=offset_rng, dtype=torch.float64)
        offset_B = (torch.randperm(batch, generator=offset_rng) + uniform_B) / batch
        yield sweep_rows(order_BL, offset_B, size, count_weight_L=count_weight_L, length=length)


# ---------------------------------------------------------------- evaluating them


@torch.no_grad()
def evaluate_rows(
    nll: TokenNLL,
    x_BL: Tensor,
    rows: MaskedRows,
    *,
    mask_id: int,
    batch_size: int,
    lengths_B: Tensor | None = None,
) -> Tensor:
    """The value of every row in nats, float64 on the CPU.

    Args:
        x_BL: the sequences, on the network's device.
        batch_size: rows per forward pass.
        lengths_B: of sequences that are padded on the right; a pass is cut to its longest, and equally long rows need
            no attention mask, so order the rows by length. None: nothing is padded.
    """
    value_R = torch.zeros(len(rows), dtype=torch.float64)
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        masked_RL = rows.masked_RL[part].to(x_BL.device)
        weight_RL = rows.weight_RL[part].to(x_BL.device)
        x_RL = x_BL[rows.sequence_R[part].to(x_BL.device)]
        visible_RL = None
        if lengths_B is not None:
            length_R = lengths_B[rows.sequence_R[part].to(lengths_B.device)]
            longest = int(length_R.max())
            x_RL, masked_RL, weight_RL = x_RL[:, :longest], masked_RL[:, :longest], weight_RL[:, :longest]
            if int(length_R.min()) < longest:
                visible_RL = (torch.arange(longest) < length_R.cpu()[:, None]).to(x_BL.device)
        scored_RL = weight_RL != 0
        if not bool(scored_RL.any()):
            continue
        padding = () if visible_RL is None else (visible_RL,)
        nll_P = nll(x_RL.masked_fill(masked_RL, mask_id), x_RL, scored_RL, *padding)
        row_P = scored_RL.nonzero()[:, 0].cpu()
        value_R[part].index_add_(0, row_P, (nll_P.double() * weight_RL[scored_RL].double()).cpu())
    return value_R if rows.offset_R is None else value_R + rows.offset_R.double().cpu()


def estimate_group(
    nll: TokenNLL, x_BL: Tensor, replicates: Iterable[MaskedRows], *, mask_id: int, batch_size: int
) -> tuple[Tensor, int]:
    """Every replicate's estimate for every sequence, float64 ``(M, B)`` in nats per sequence, and the rows spent."""
    values, waiting, count = [], [], 0

    def flush() -> None:
        if not waiting:
            return
        joined = join_rows(waiting)
        value_R = evaluate_rows(nll, x_BL, joined, mask_id=mask_id, batch_size=batch_size)
        for rows, part_R in zip(waiting, value_R.split([len(rows) for rows in waiting]), strict=True):
            values.append(torch.zeros(len(x_BL), dtype=torch.float64).index_add_(0, rows.sequence_R, part_R))
        waiting.clear()

    for rows in replicates:
        count += len(rows)
        waiting.append(rows)
        if sum(map(len, waiting)) >= _ROWS_AHEAD * batch_size:
            flush()
    flush()
    return torch.stack(values), count


def join_rows(parts: Sequence[MaskedRows]) -> MaskedRows:
    """Rows of several replicates, one after the other; all of one length."""
    with_offset = any(rows.offset_R is not None for rows in parts)
    offsets = [torch.zeros(len(rows)) if rows.offset_R is None else rows.offset_R for rows in parts]
    return MaskedRows(
        torch.cat([rows.sequence_R for rows in parts]),
        torch.cat([rows.masked_RL for rows in parts]),
        torch.cat([rows.weight_RL for rows in parts]),
        torch.cat(offsets) if with_offset else None,
    )


# ---------------------------------------------------------------- putting groups together


@dataclass(frozen=True)
class GroupEstimate:
    """What remains of a group of sequences; JSON-able by ``vars``.

    Attributes:
        nats: estimate of every sequence, mean over replicates.
        draw_variance: variance of the sum of ``nats`` over new random masks; None with a single replicate.
        rows: network rows spent.
    """

    nats: list[float]
    draw_variance: float | None
    rows: int

    @classmethod
    def from_values(cls, value_MB: Tensor, rows: int) -> "GroupEstimate":
        """Sequences of a group share strata, so the spread is taken of their sum, not of each."""
        replicates = len(value_MB)
        variance = float(value_MB.sum(dim=1).var(correction=1)) / replicates if replicates > 1 else None
        return cls(value_MB.mean(dim=0).tolist(), variance, rows)


@dataclass(frozen=True)
class BoundEstimate:
    """Perplexity of a test set.

    Attributes:
        nats_per_token: mean; its error is that of the random masks, for these sequences.
        sequence_error: standard error of the mean over sequences, as a sample of their corpus (it includes the masks').
        sequences, tokens, rows: what it was computed from.
    """

    nats_per_token: Metric
    sequence_error: float | None
    sequences: int
    tokens: int
    rows: int

    @property
    def perplexity(self) -> Metric:
        return perplexity_metric("perplexity", self.nats_per_token)

    def metrics(self) -> Iterator[Metric]:
        yield self.perplexity
        yield self.nats_per_token
        sample = Metric("nats_per_token", self.nats_per_token.value, self.sequence_error)
        yield Metric("perplexity_over_sequences", self.perplexity.value, perplexity_metric("", sample).standard_error)


def combine(groups: Sequence[GroupEstimate], length: int, *, is_exact: bool = False) -> BoundEstimate:
    """Mean over all sequences, each with the same weight, whatever the sizes of the groups.

    Args:
        length: L, tokens per sequence.
        is_exact: the values have no Monte-Carlo error (fixed orders).
    """
    nats = [value / length for group in groups for value in group.nats]
    mean = mean_metric("nats_per_token", nats)
    if is_exact:
        error: float | None = 0.0
    elif any(group.draw_variance is None for group in groups):
        error = None
    else:
        error = math.sqrt(sum(group.draw_variance for group in groups)) / (len(nats) * length)
    return BoundEstimate(
        nats_per_token=Metric("nats_per_token", mean.value, error),
        sequence_error=mean.standard_error,
        sequences=len(nats),
        tokens=len(nats) * length,
        rows=sum(group.rows for group in groups),
    )


def estimate_bound(
    denoise: Denoiser,
    x_NL: Tensor,
    *,
    mask_id: int,
    draws: int,
    batch_size: int = 16,
    seed: int = 0,
    group_size: int = GROUP_SIZE,
) -> BoundEstimate:
    """The bound of equally long sequences by sweeps, in one process: for tests, notebooks and periodic evaluation.

    Args:
        x_NL: sequences, on the network's device.
        draws: network rows per sequence.
        batch_size: rows per forward pass.
    Raises: ConfigError for no sequences or no draws.
    """
    if not len(x_NL):
        raise ConfigError("there are no sequences to score.")
    groups = []
    for first in range(0, len(x_NL), group_size):
        x_BL = x_NL[first : first + group_size]
        replicates = sweep_replicates(first, *x_BL.shape, draws=draws, seed=seed)
        value_MB, rows = estimate_group(nll_of(denoise), x_BL, replicates, mask_id=mask_id, batch_size=batch_size)
        groups.append(GroupEstimate.from_values(value_MB, rows))
    return combine(groups, x_NL.shape[1])


# ---------------------------------------------------------------- conditional likelihood


def conditional_replicates(hidden_L: Tensor, *, draws: int, rng: torch.Generator) -> Iterator[MaskedRows]:
    """Replicates for one sequence of which only the positions of ``hidden_L`` (bool) are scored, the rest is visible.

    All masks, if ``draws`` rows suffice for that (a single position takes one row); else sweeps over the counts
    1..l with l the number of scored positions.
    """
    position_P = hidden_L.nonzero().squeeze(1)
    length = len(position_P)
    if length < 32 and 2**length - 1 <= draws:
        yield enumeration_rows(position_P, len(hidden_L))
        return
    for size in sweep_sizes(draws, length):
        rank_BL = torch.full((1, len(hidden_L)), -1)
        rank_BL[0, position_P] = torch.randperm(length, generator=rng)
        yield sweep_rows(rank_BL, torch.rand(1, generator=rng, dtype=torch.float64), size, length=length)
