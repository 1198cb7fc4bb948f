"""Likelihood bounds of an adapted model on blocks of text, the parent's exact likelihood, and losses of a hidden span.

Two unbiased estimators of the same bound: ``time`` masks every token with a stratified rate t and weighs by 1/t, as
training does; ``count`` masks exact numbers of tokens (``common/evaluation/perplexity.py``) and has less variance.
With shift the first token of a block has no prediction: it is given, and not counted. Put a beginning-of-text token
there, and every token of the text is scored.

Dimensions: B blocks of a group, L positions, n scored tokens of a block, M replicates.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import require_at_least, require_choice
from common.errors import DataError
from common.evaluation.metric import Metric
from common.evaluation.perplexity import (
    GROUP_SIZE,
    BoundEstimate,
    GroupEstimate,
    MaskedRows,
    combine,
    estimate_group,
    sweep_replicates,
)
from common.seeding import generator
from diffullama.model import DiffusionLM
from diffullama.scoring import causal_nll, token_nll

ESTIMATORS = ("count", "time")
SPAN_KINDS = ("with_suffix", "without_suffix")


def nelbo(
    model: DiffusionLM,
    x: Tensor,
    estimator: str = "count",
    *,
    draws: int = 16,
    seed: int = 0,
    batch_size: int = 64,
    given: int | None = None,
) -> "NelboMetric":
    """The bound in nats per scored token; ``mean, stderr = nelbo(...)`` unpacks.

    Args:
        model: in eval mode.
        x: int64 ids ``(N, L)``.
        estimator: ``count`` or ``time``.
        draws: network rows per block; two or more give a standard error.
        batch_size: rows per forward pass.
        given: first tokens of every block that are visible and not scored; None: one with shift, else none.

    Returns: mean, and its standard error over the random masks, for these blocks.
    Source: specification 6.4. Raises: ConfigError for no draws, DataError for blocks without a token to score.
    """
    groups, scored = [], scored_tokens(model, x, given)
    for first in range(0, len(x), GROUP_SIZE):
        groups.append(
            group_bound(
                model,
                x[first : first + GROUP_SIZE],
                first,
                estimator=estimator,
                draws=draws,
                seed=seed,
                batch_size=batch_size,
                given=given,
            )
        )
    bound = combine(groups, scored)
    return NelboMetric("nelbo", bound.nats_per_token.value, bound.nats_per_token.standard_error, bound)


@dataclass(frozen=True)
class NelboMetric(Metric):
    """A metric that unpacks as mean and standard error.

    Attributes:
        bound: everything that was computed.
    """

    bound: BoundEstimate | None = None

    def __iter__(self) -> Iterator[float | None]:
        return iter((self.value, self.standard_error))


def scored_tokens(model: DiffusionLM, x_BL: Tensor, given: int | None = None) -> int:
    """n: tokens of a block that are scored.

    Raises: DataError if there is none, or with shift the first one would be.
    """
    given = int(model.shift) if given is None else given
    if x_BL.dim() != 2 or not len(x_BL) or x_BL.shape[1] <= given:
        raise DataError(f"blocks of shape {tuple(x_BL.shape)} hold no token to score after {given} given ones.")
    if model.shift and given < 1:
        raise DataError("given=0: with shift the first token has no prediction; give at least one.")
    return x_BL.shape[1] - given


def group_bound(
    model: DiffusionLM,
    x_BL: Tensor,
    first: int,
    *,
    estimator: str,
    draws: int,
    seed: int,
    batch_size: int,
    given: int | None = None,
) -> GroupEstimate:
    """The bound of a group of blocks, which share strata; ``first`` is its first block's number in the data.

    A group's numbers are drawn from (seed, first) alone, so groups can be computed in any order and place.
    """
    require_choice("estimator", estimator, ESTIMATORS)
    require_at_least("draws", draws, 1)
    scored = scored_tokens(model, x_BL, given)
    start = x_BL.shape[1] - scored
    if estimator == "count":
        replicates = sweep_replicates(first, len(x_BL), scored, draws=draws, seed=seed, given=start)
    else:
        replicates = time_replicates(first, *x_BL.shape, draws=draws, seed=seed, given=start)
    value_MB, rows = estimate_group(
        token_nll(model), x_BL.to(model.device), replicates, mask_id=model.mask_id, batch_size=batch_size
    )
    if not bool(torch.isfinite(value_MB).all()):
        raise DataError(
            f"blocks {first} to {first + len(x_BL) - 1} have a loss that is not finite; use precision=fp32, or check "
            "the model's weights."
        )
    return GroupEstimate.from_values(value_MB, rows)


def time_replicates(
    first: int, batch: int, length: int, *, draws: int, seed: int, given: int = 0
) -> Iterator[MaskedRows]:
    """One row per block and draw at times stratified over the group's blocks, dealt to them at random; weight 1/t.

    Times are in (0, 1], so the expectation is the bound itself (training stops at its smallest time).
    """
    rng = generator(seed, "bound times", first)
    for _ in range(draws):
        v = 1 - torch.rand(1, generator=rng, dtype=torch.float64)  # in (0, 1]
        t_B = ((torch.randperm(batch, generator=rng) + v) / batch).float()
        masked_BL = torch.rand(batch, length, generator=rng) < t_B[:, None]
        masked_BL[:, :given] = False
        yield MaskedRows(torch.arange(batch), masked_BL, masked_BL / t_B[:, None])


# ---------------------------------------------------------------- the parent, and spans


def causal_nats(model: DiffusionLM, x_BL: Tensor, *, batch_size: int = 16) -> list[float]:
    """Exact NLL in nats of each block's tokens after the first, under causal attention."""
    return causal_nll(model, x_BL.tolist(), [1] * len(x_BL), batch_size=batch_size)


@dataclass(frozen=True)
class Span:
    """Positions ``start .. start + length - 1`` of a block."""

    start: int
    length: int

    @classmethod
    def middle(cls, block: int, length: int) -> "Span":
        """``length`` tokens in the middle of a block, which keeps at least one token before them.

        Raises: DataError if they do not fit.
        """
        start = (block - length) // 2
        if length < 1 or start < 1:
            raise DataError(f"a span of {length} tokens does not fit between the tokens of a block of {block}.")
        return cls(start, length)


@torch.no_grad()
def span_nll(model: DiffusionLM, x_BL: Tensor, span: Span, *, batch_size: int = 64) -> dict[str, list[float]]:
    """Mean NLL of each block's span, all of it masked: with the true suffix, and with the suffix masked as well.

    The paired difference shows how much the model gains from the right context. Source: specification 6.4 and 10.
    """
    end = span.start + span.length
    found: dict[str, list[float]] = {kind: [] for kind in SPAN_KINDS}
    for kind in SPAN_KINDS:
        for first in range(0, len(x_BL), batch_size):
            x = x_BL[first : first + batch_size].to(model.device)
            where_BL = torch.zeros_like(x, dtype=torch.bool)
            where_BL[:, span.start : end] = True
            z_BL = x.masked_fill(where_BL, model.mask_id)
            if kind == "without_suffix":
                z_BL[:, end:] = model.mask_id
            nll_P = model(z_BL, x, where_BL)
            found[kind] += nll_P.double().view(len(x), span.length).mean(dim=1).tolist()
    return found
