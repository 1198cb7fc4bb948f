"""In which order positions are filled: given permutations, and rules that look at the network's predictions.

Dimensions: B sequences in all, R sequences in this call, L positions, P positions with predictions, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import require_at_least, require_choice
from common.errors import ConfigError
from common.seeding import generator

ORDERS = ("random", "random_shared", "forward", "backward")
SELECTION_ORDERS = ("random", "left_to_right", "confidence", "margin", "entropy")


def check_order(order: Tensor | Sequence, length: int) -> Tensor:
    """``order`` as int64 ``(L,)`` or ``(B, L)`` on the CPU.

    Raises: ConfigError unless every row is a permutation of 0..L-1.
    """
    try:
        order = torch.as_tensor(order)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"order={order!r} is not a list of positions, or of equally long lists of positions, one per row."
        ) from error
    if order.is_floating_point() or order.dtype == torch.bool or order.dim() not in (1, 2):
        raise ConfigError(f"order must hold integers, as one list or one list per row; got shape {tuple(order.shape)}.")
    order = order.long().cpu()
    if order.shape[-1] != length:
        raise ConfigError(f"order has {order.shape[-1]} positions, but length={length}; name every position once.")
    if not torch.equal(order.sort(dim=-1).values, torch.arange(length).expand_as(order)):
        raise ConfigError(
            f"order is not a permutation of 0..{length - 1}: some position is missing, doubled or out of range."
        )
    return order


def build_order(name: str, length: int, *, rows: Sequence[int], seed: int) -> Tensor:
    """The order called ``name``: ``(L,)``, or ``(B, L)`` for ``random``, which is independent for every row number.

    ``random_shared`` is one random permutation for all rows (the reference's default).
    """
    require_choice("order", name, ORDERS)
    if name == "forward":
        return torch.arange(length)
    if name == "backward":
        return torch.arange(length - 1, -1, -1)
    if name == "random_shared":
        return torch.randperm(length, generator=generator(seed, "order"))
    permutations = [torch.randperm(length, generator=generator(seed, "order", row)) for row in rows]
    return torch.stack(permutations) if permutations else torch.empty(0, length, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class SelectionRule:
    """Which of the predicted positions one network call fills. Exactly one of the last four fields is set.

    Attributes:
        order: which positions come first: ``confidence`` (largest probability of the token drawn there), ``margin``
            (largest gap between the two likeliest tokens), ``entropy`` (lowest), ``random``, ``left_to_right``.
        noise: scale of Gumbel noise added to the scores; 0 ranks deterministically.
        per_call: positions filled per call: ceil(l / per_call) calls for l masked positions.
        steps: number of calls, min(steps, l) exactly; counts differ by at most one.
        threshold: fills all positions whose drawn token has more than this probability, at least the first in order.
        entropy_bound: fills the first positions in order as long as the sum of their entropies less the largest of
            them stays within this bound (nats), at least one; the bound limits the error of filling them independently.

    Source: confidence order of MaskGIT and LLaDA, margin and entropy order of Dream, threshold of Fast-dLLM, bound of
        the entropy-bounded sampler (Ben-Hamu et al., 2025).
    """

    order: str = "confidence"
    noise: float = 0.0
    per_call: int | None = None
    steps: int | None = None
    threshold: float | None = None
    entropy_bound: float | None = None

    def __post_init__(self) -> None:
        require_choice("order", self.order, SELECTION_ORDERS)
        require_at_least("noise", self.noise, 0)
        options = ("per_call", "steps", "threshold", "entropy_bound")
        chosen = [name for name in options if getattr(self, name) is not None]
        if len(chosen) != 1:
            raise ConfigError(f"set exactly one of {', '.join(options)}; got {', '.join(chosen) or 'none'}.")
        if self.per_call is not None:
            require_at_least("per_call", self.per_call, 1)
        if self.steps is not None:
            require_at_least("steps", self.steps, 1)
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise ConfigError(f"threshold={self.threshold} must lie in [0, 1): it is a probability.")
        if self.entropy_bound is not None:
            require_at_least("entropy_bound", self.entropy_bound, 0)

    @property
    def is_fixed(self) -> bool:
        """Whether the positions of every call are known before any prediction."""
        return self.order in ("random", "left_to_right") and self.noise == 0 and bool(self.per_call or self.steps)

    def max_calls(self, free_tokens: int) -> int:
        """Calls needed for ``free_tokens`` masked positions: exact for counts, an upper bound otherwise."""
        if self.per_call is not None:
            return math.ceil(free_tokens / self.per_call)
        return free_tokens if self.steps is None else min(self.steps, free_tokens)

    def counts(self, call_R: Tensor, total_R: Tensor) -> Tensor:
        """Positions to fill in call ``call_R`` (from 0) of rows that started with ``total_R`` masked positions."""
        if self.per_call is not None:
            return torch.full_like(total_R, self.per_call)
        base_R = total_R // self.steps
        return (base_R + (call_R < total_R - base_R * self.steps)).clamp_min(1)


def entropy(log_probs_PV: Tensor) -> Tensor:
    """Entropy of each row in nats; columns of -inf count as zero."""
    return torch.special.entr(log_probs_PV.exp()).sum(-1)


def score_positions(
    order: str, log_probs_PV: Tensor, drawn_P: Tensor, position_P: Tensor, uniform_P: Tensor | None = None
) -> Tensor:
    """A score per position, larger first.

    Args:
        order: one of ``SELECTION_ORDERS``.
        log_probs_PV: predictions.
        drawn_P: the token drawn at each position (``confidence`` is its log-probability).
        position_P: index of the position in its sequence.
        uniform_P: uniforms of order ``random``.
    """
    require_choice("order", order, SELECTION_ORDERS)
    if order == "confidence":
        return log_probs_PV.gather(-1, drawn_P.unsqueeze(-1)).squeeze(-1).double()
    if order == "entropy":
        return -entropy(log_probs_PV).double()
    if order == "margin":
        top_P2 = log_probs_PV.topk(min(2, log_probs_PV.shape[-1]), dim=-1).values.exp()
        return (top_P2[:, 0] - top_P2[:, -1]).double()
    if order == "left_to_right":
        return -position_P.double()
    if uniform_P is None:
        raise ConfigError("order=random needs uniforms; pass uniform_P.")
    return uniform_P.double()


def select(
    rule: SelectionRule,
    score_RL: Tensor,
    log_probability_RL: Tensor,
    entropy_RL: Tensor,
    candidates_RL: Tensor,
    counts_R: Tensor | None,
) -> Tensor:
    """The positions to fill now, bool ``(R, L)``: a subset of ``candidates_RL``, never empty where that is not.

    Args:
        rule: which and how many.
        score_RL: larger first; only read at candidates.
        log_probability_RL: of the token drawn at each position (read by ``threshold``).
        entropy_RL: of the prediction at each position, nats (read by ``entropy_bound``).
        candidates_RL: positions that may be filled.
        counts_R: how many to fill (read when the rule fixes a count).
    """
    ranked_RL = torch.where(candidates_RL, score_RL, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    # rank_RL[r, i]: how many positions come before i; positions that are no candidates come last.
    index_RL = torch.arange(score_RL.shape[-1], device=score_RL.device).expand_as(ranked_RL)
    rank_RL = torch.empty_like(ranked_RL).scatter_(-1, ranked_RL, index_RL)
    if rule.threshold is not None:
        chosen_RL = (log_probability_RL > math.log(rule.threshold) if rule.threshold else candidates_RL) | (
            rank_RL == 0
        )
    elif rule.entropy_bound is not None:
        ordered_RL = torch.where(candidates_RL, entropy_RL, torch.inf).gather(-1, ranked_RL)
        cost_RL = ordered_RL.cumsum(-1) - ordered_RL.cummax(-1).values
        allowed_RL = (torch.nan_to_num(cost_RL, nan=torch.inf) <= rule.entropy_bound).long().cumprod(-1).bool()
        chosen_RL = allowed_RL.gather(-1, rank_RL) | (rank_RL == 0)
    else:
        chosen_RL = rank_RL < counts_R.unsqueeze(-1)
    return chosen_RL & candidates_RL
