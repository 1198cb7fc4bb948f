"""Plans: which network call of a sequence reveals which of its masked positions, fixed before the first call.

The time (or rank) at which an absorbing process reveals a position depends neither on the tokens nor on the other
positions. So one uniform per position, its *reveal level*, settles it: the diffusion grid turns the level into a step,
the first-hitting sampler into a rank. The same levels therefore give nested plans: a finer grid approaches the
first-hitting order. What a sequence needs is only the *events*: its non-empty steps, numbered 0, 1, ... .

Dimensions: B sequences, L positions, S steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import ConfigError
from common.seeding import generator

GIVEN = -1  # event of a position whose token is given
AFTER_STOP = -2  # event of a position that is never revealed, because a token that ends the text comes before it


@dataclass
class RevealPlan:
    """Sequences to fill and when to fill each position.

    Attributes:
        index_B: the rows' numbers, int64 on the CPU; they name the rows in results.
        tokens_BL: ids, the mask at free positions.
        event_BL: the call (from 0, without gaps) that reveals each position, ``GIVEN`` at given ones.
        uniform_BL: one uniform per position for drawing its token, float64.
    """

    index_B: Tensor
    tokens_BL: Tensor
    event_BL: Tensor
    uniform_BL: Tensor

    @property
    def calls_B(self) -> Tensor:
        """Network calls each row needs: its number of events."""
        if not self.event_BL.shape[1]:
            return torch.zeros(len(self.event_BL), dtype=torch.int64)
        return self.event_BL.amax(dim=1).cpu() + 1

    def __len__(self) -> int:
        return len(self.index_B)


def row_uniforms(seed: int, rows: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
    """(reveal_BL, token_BL): two float64 uniforms per position that depend on (seed, row number, length) only."""
    if not len(rows):
        return torch.empty(0, length, dtype=torch.float64), torch.empty(0, length, dtype=torch.float64)
    both_B2L = torch.stack(
        [torch.rand(2, length, dtype=torch.float64, generator=generator(seed, "sample", int(row))) for row in rows]
    )
    return both_B2L[:, 0], both_B2L[:, 1]


def dense_events(key_BL: Tensor, free_BL: Tensor) -> Tensor:
    """Numbers the distinct keys of each row's free positions 0, 1, ... in ascending order; ``GIVEN`` elsewhere."""
    if not free_BL.shape[1]:
        return torch.empty_like(free_BL, dtype=torch.int64)
    last = key_BL.amax() + 1 if key_BL.numel() else 0
    sorted_BL, position_BL = torch.where(free_BL, key_BL, last).sort(dim=1)
    new_BL = torch.zeros_like(sorted_BL)
    new_BL[:, 1:] = sorted_BL[:, 1:] != sorted_BL[:, :-1]
    event_BL = torch.empty_like(sorted_BL).scatter_(1, position_BL, new_BL.cumsum(1))
    return torch.where(free_BL, event_BL, GIVEN)


def ranks(level_BL: Tensor, free_BL: Tensor) -> Tensor:
    """Rank 0, 1, ... of each free position by ascending level; ``GIVEN`` elsewhere."""
    position_BL = torch.where(free_BL, level_BL.double(), torch.inf).argsort(dim=1, stable=True)
    index_BL = torch.arange(free_BL.shape[1], device=free_BL.device).expand_as(position_BL)
    rank_BL = torch.empty_like(position_BL).scatter_(1, position_BL, index_BL)
    return torch.where(free_BL, rank_BL, GIVEN)


def reveal_steps(level_BL: Tensor, reveal_S: Tensor) -> Tensor:
    """The grid step in which each position is revealed: categorical with probabilities ``reveal_S``."""
    cdf_S = reveal_S.double().cumsum(0).to(level_BL.device)
    return torch.searchsorted(cdf_S, level_BL.double() * cdf_S[-1], right=True).clamp_max(len(reveal_S) - 1)


def diffusion_events(
    level_BL: Tensor, free_BL: Tensor, reveal_S: Tensor | None, block_length: int | None = None
) -> Tensor:
    """Events of a reverse diffusion: exactly the law of running all S steps one by one.

    Args:
        level_BL: reveal levels in [0, 1).
        free_BL: positions to fill.
        reveal_S: probability of being revealed in each step (``nfe.reveal_distribution``); None stands for infinitely
            many steps, in which every call reveals one position: the first-hitting sampler. (With k positions masked
            the next masking probability is lambda * u^(1/k), the largest of k uniforms; the order is uniform.)
        block_length: fills blocks of so many positions from left to right, each by a diffusion of its own.

    Source: RADD, independence of reveal times from tokens; Zheng et al. (2024), first-hitting sampler.
    """
    if reveal_S is None:
        key_BL = ranks(level_BL, free_BL)
    else:
        key_BL = reveal_steps(level_BL, reveal_S)
    if block_length is not None:
        if block_length < 1:
            raise ConfigError(f"block_length={block_length} must be at least 1; null fills the whole sequence at once.")
        span = (key_BL.amax() + 1) if key_BL.numel() else 1
        key_BL = key_BL + span * (torch.arange(key_BL.shape[1], device=key_BL.device) // block_length)
    return dense_events(key_BL, free_BL)


def ordered_events(order: Tensor, free_BL: Tensor, per_call: int = 1) -> Tensor:
    """Events that fill free positions in ``order`` ((L,) or (B, L), checked), ``per_call`` at a time."""
    order_BL = order.to(free_BL.device).expand(free_BL.shape)
    index_BL = torch.arange(free_BL.shape[1], device=free_BL.device).expand(free_BL.shape)
    rank_BL = ranks(torch.empty_like(index_BL).scatter_(1, order_BL, index_BL), free_BL)
    return torch.where(free_BL, rank_BL.div(per_call, rounding_mode="floor"), GIVEN)


def split_events(rank_BL: Tensor, free_BL: Tensor, steps: int) -> Tensor:
    """Events that fill positions by rank in min(steps, l) calls whose counts differ by at most one, larger first."""
    total_B1 = free_BL.sum(1, keepdim=True)
    calls_B1 = total_B1.clamp(1, steps)
    base_B1 = total_B1 // calls_B1
    large_B1 = total_B1 - base_B1 * calls_B1  # so many calls fill one position more
    first_BL = rank_BL.div(base_B1 + 1, rounding_mode="floor")
    rest_BL = large_B1 + (rank_BL - large_B1 * (base_B1 + 1)).div(base_B1.clamp_min(1), rounding_mode="floor")
    return torch.where(free_BL, torch.where(rank_BL < large_B1 * (base_B1 + 1), first_BL, rest_BL), GIVEN)


def event_states(tokens_L: Tensor, revealed_L: Tensor, mask_id: int) -> Iterator[Tensor]:
    """The states of one finished row: before its first call, after each call; replays a run from its result.

    Positions behind the end of the text are masked in all states but the last.
    """
    last = int(revealed_L.max()) + 1 if len(revealed_L) else 0
    shown_L = torch.where(revealed_L == AFTER_STOP, last - 1, revealed_L)
    for call in range(last + 1):
        yield torch.where(shown_L < call, tokens_L, mask_id)
