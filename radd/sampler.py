"""RADD's samplers under the reference's names and options, on top of ``common/diffusion``.

    sampler = DiffusionSampler(model, schedule, method="tweedie", steps=1024, strategy="top_p", strategy_para=0.9)
    result = sampler.sample(sampler.canvas(8, 1024, prefix=tokenizer.encode("Once")), seed=0)
    result.tokens_BL, result.nfe, sampler.expected_calls(free_L)

Every random number of a row comes from (seed, row number): neither the batch nor the number of processes matters.
``stream`` takes any number of rows, keeps at most ``max_rows`` of them in flight and yields each as it is completed.

Dimensions: B sequences, L positions, S steps.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.config import require_choice
from common.diffusion.absorbing import Denoiser, FinishedRow, OnLaunch, SampleResult, collect, run_events
from common.diffusion.canvas import Fixed, build_canvas
from common.diffusion.categorical import TokenDraw
from common.diffusion.decoding import run_selection
from common.diffusion.nfe import (
    DEFAULT_EPS,
    METHODS,
    calls_variance,
    expected_calls,
    require_steps,
    reveal_distribution,
    update_rate,
)
from common.diffusion.orders import ORDERS, SelectionRule, build_order, check_order
from common.diffusion.reveal import RevealPlan, diffusion_events, ordered_events, ranks, row_uniforms, split_events
from common.diffusion.schedules import Schedule
from common.diffusion.stepwise import sample_stepwise
from common.errors import ConfigError

PAGE_ROWS = 256  # waiting rows that are planned at once

Page = tuple[Tensor, Tensor]
"""(index_B, tokens_BL): row numbers and their canvases."""


class Calls(NamedTuple):
    """Network calls that one row is expected to need; without variance they are certain, or at most that many."""

    mean: float
    variance: float = 0.0
    is_bound: bool = False


def denoiser(model: nn.Module) -> Denoiser:
    """The network as a function (tokens_RL, where_RL) -> log-probabilities at the chosen positions."""
    return lambda tokens_RL, where_RL: model(tokens_RL, where=where_RL)


class Sampler(ABC):
    """What all samplers share: the network, how tokens are drawn, canvases, and running rows to their end.

    Args:
        model: a ``RADD`` in eval mode; ``model.mask_id`` is the number of real tokens.
        strategy: ``direct``, ``top_p``, ``top_k``, ``min_p`` or ``greedy``.
        strategy_para: p or k.
        temperature: log-probabilities are divided by it; 0 is greedy.
        precision: of the draws, ``common/diffusion/categorical.py``.

    Raises: ConfigError for options out of range, here and not in the first call.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strategy: str = "direct",
        strategy_para: float | None = None,
        temperature: float = 1.0,
        precision: str = "float64",
    ) -> None:
        self.denoise = denoiser(model)
        self.mask_id: int = model.mask_id
        self.draw = TokenDraw(strategy=strategy, para=strategy_para, temperature=temperature, precision=precision)
        self.draw.check_vocabulary(self.mask_id)
        self.device = next(model.parameters()).device

    def canvas(
        self,
        size: int,
        length: int,
        *,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        fixed: Fixed | None = None,
    ) -> Tensor:
        """``size`` rows with the mask everywhere but at given positions (``common/diffusion/canvas.py``)."""
        given = {"prefix": prefix, "suffix": suffix, "fixed": fixed}
        return build_canvas(size, length, self.mask_id, num_tokens=self.mask_id, device=self.device, **given)

    def sample(
        self,
        tokens_BL: Tensor,
        *,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        max_rows: int | None = None,
        on_launch: OnLaunch | None = None,
    ) -> SampleResult:
        """Fills the masked positions of ``tokens_BL``; row b has the random numbers of row number ``rows[b]``."""
        index_B = torch.arange(len(tokens_BL)) if rows is None else torch.as_tensor(list(rows), dtype=torch.int64)
        finished = self.run([(index_B, tokens_BL)], seed=seed, max_rows=max_rows, on_launch=on_launch)
        return collect(finished, index_B, tokens_BL, getattr(self, "steps", None))

    def stream(
        self,
        tokens_L: Tensor,
        rows: Iterable[int],
        *,
        seed: int = 0,
        max_rows: int | None = None,
        on_launch: OnLaunch | None = None,
    ) -> Iterator[FinishedRow]:
        """Fills one canvas once per row number and yields each row as it is completed."""
        index_B = torch.as_tensor(list(rows), dtype=torch.int64)
        pages = ((page, tokens_L.expand(len(page), -1)) for page in index_B.split(PAGE_ROWS)) if len(index_B) else ()
        return self.run(pages, seed=seed, max_rows=max_rows, on_launch=on_launch)

    @abstractmethod
    def run(
        self, pages: Iterable[Page], *, seed: int, max_rows: int | None, on_launch: OnLaunch | None
    ) -> Iterator[FinishedRow]:
        """Samples pages of rows."""

    @abstractmethod
    def expected_calls(self, free_L: Tensor) -> Calls:
        """Network calls of one row whose free positions are marked in ``free_L``."""


class PlannedSampler(Sampler):
    """Samplers whose reveal order does not depend on the network's output."""

    @abstractmethod
    def events(self, level_BL: Tensor, free_BL: Tensor, index_B: Tensor, seed: int) -> Tensor:
        """The call in which each position is revealed."""

    def run(
        self, pages: Iterable[Page], *, seed: int, max_rows: int | None, on_launch: OnLaunch | None
    ) -> Iterator[FinishedRow]:
        def plans() -> Iterator[RevealPlan]:
            for index_B, tokens_BL in pages:
                level_BL, token_BL = row_uniforms(seed, index_B.tolist(), tokens_BL.shape[1])
                free_BL = (tokens_BL == self.mask_id).cpu()
                yield RevealPlan(index_B, tokens_BL, self.events(level_BL, free_BL, index_B, seed), token_BL)

        return run_events(
            self.denoise, plans(), draw=self.draw, max_rows=max_rows, device=self.device, on_launch=on_launch
        )


class DiffusionSampler(PlannedSampler):
    """Reverse diffusion over a time grid: ``tweedie`` or ``euler``, exact, one call per step that reveals something.

    Args:
        model, strategy, ...: see ``Sampler``.
        noise: the schedule that the model was trained with.
        method: ``tweedie`` or ``euler``.
        steps: steps of the grid.
        eps: time at which it ends.
        block_length: fills blocks of so many positions from left to right, each in ``steps`` steps; None: all at once.
        event_driven: False walks the grid step by step as the reference does (slower, the same law; with ``strategy``
            direct one draw decides both whether and what, which float32 and float16-compat distort).

    Source: RADD (Ou et al., 2024), section 3; spec 5.1, 5.2 and 9.1.
    """

    def __init__(
        self,
        model: nn.Module,
        noise: Schedule,
        *,
        method: str = "tweedie",
        steps: int = 1024,
        eps: float = DEFAULT_EPS,
        block_length: int | None = None,
        event_driven: bool = True,
        **options: object,
    ) -> None:
        super().__init__(model, **options)
        require_choice("method", method, METHODS)
        require_steps(steps)
        if event_driven and self.draw.precision == "float16-compat":
            raise ConfigError(
                "precision=float16-compat repeats the reference's one-stage draw; set sampler=stepwise, or use "
                "precision=float64 or float32."
            )
        if block_length is not None and (block_length < 1 or not event_driven):
            raise ConfigError(f"block_length={block_length} must be at least 1 and needs sampler=event.")
        self.steps, self.block_length, self.event_driven = int(steps), block_length, event_driven
        self.rate_S = update_rate(noise, method, self.steps, eps)
        self.reveal_S = reveal_distribution(self.rate_S)

    def events(self, level_BL: Tensor, free_BL: Tensor, index_B: Tensor, seed: int) -> Tensor:
        return diffusion_events(level_BL, free_BL, self.reveal_S, self.block_length)

    def run(
        self, pages: Iterable[Page], *, seed: int, max_rows: int | None, on_launch: OnLaunch | None
    ) -> Iterator[FinishedRow]:
        if self.event_driven:
            return super().run(pages, seed=seed, max_rows=max_rows, on_launch=on_launch)
        return self._run_stepwise(pages, seed, max_rows, on_launch)

    def _run_stepwise(
        self, pages: Iterable[Page], seed: int, max_rows: int | None, on_launch: OnLaunch | None
    ) -> Iterator[FinishedRow]:
        launches = 0
        for index_B, tokens_BL in pages:
            size = max_rows or max(1, len(index_B))
            for rows_R, tokens_RL in zip(index_B.split(size), tokens_BL.split(size)):
                result = sample_stepwise(
                    self.denoise,
                    tokens_RL.to(self.device),
                    self.rate_S,
                    mask_id=self.mask_id,
                    draw=self.draw,
                    seed=seed,
                    rows=rows_R.tolist(),
                    on_launch=on_launch,
                )
                launches += result.launches
                for row, index in enumerate(rows_R.tolist()):
                    yield FinishedRow(
                        index,
                        result.tokens_BL[row].cpu(),
                        int(result.calls_B[row]),
                        result.revealed_BL[row],
                        launches,
                        result.seconds,
                    )

    def expected_calls(self, free_L: Tensor) -> Calls:
        blocks = free_L.split(self.block_length or len(free_L))
        counts = [int(block.sum()) for block in blocks]
        return Calls(
            sum(expected_calls(self.reveal_S, count) for count in counts),
            sum(calls_variance(self.reveal_S, count) for count in counts),
        )


class FirstHittingSampler(PlannedSampler):
    """The limit of infinitely many steps, exact: one call per token, in an order that is uniformly random for each row.

    Source: Zheng et al. (2024), first-hitting sampler; the times are not needed because the network does not see them.
    """

    def events(self, level_BL: Tensor, free_BL: Tensor, index_B: Tensor, seed: int) -> Tensor:
        return diffusion_events(level_BL, free_BL, None)

    def expected_calls(self, free_L: Tensor) -> Calls:
        return Calls(float(free_L.sum()))


class OrderedSampler(PlannedSampler):
    """Any-order autoregressive sampling: fills masked positions in a given order and passes over given ones.

    Args:
        model, strategy, ...: see ``Sampler``.
        order: ``random`` (a new permutation for every row), ``random_shared`` (one for all, the reference's default),
            ``forward``, ``backward``, a permutation, or one permutation per row number.
        per_call: positions filled by each call, as if they were independent.
    """

    def __init__(
        self, model: nn.Module, order: str | Sequence | Tensor = "random", *, per_call: int = 1, **options: object
    ) -> None:
        super().__init__(model, **options)
        if isinstance(order, str):
            require_choice("order", order, ORDERS)
        if per_call < 1:
            raise ConfigError(f"per_call={per_call} must be at least 1.")
        self.order, self.per_call = order, per_call

    def events(self, level_BL: Tensor, free_BL: Tensor, index_B: Tensor, seed: int) -> Tensor:
        length = free_BL.shape[1]
        if isinstance(self.order, str):
            order = build_order(self.order, length, rows=index_B.tolist(), seed=seed)
        else:
            order = check_order(self.order, length)
            if order.dim() == 2:
                if len(index_B) and int(index_B.max()) >= len(order):
                    raise ConfigError(
                        f"order has {len(order)} rows, but row {int(index_B.max())} was asked for; give one order for "
                        "all rows, or one per row."
                    )
                order = order[index_B]
        return ordered_events(order, free_BL, self.per_call)

    def expected_calls(self, free_L: Tensor) -> Calls:
        return Calls(float(math.ceil(int(free_L.sum()) / self.per_call)))


class SelectionSampler(Sampler):
    """Parallel decoding: several positions per call, chosen by confidence, margin, entropy, at random or from the left.

    Not the law of the diffusion. Args: ``rule`` (``common/diffusion/orders.py``) and ``block_length``; the others are
    those of ``Sampler``.
    """

    def __init__(
        self, model: nn.Module, rule: SelectionRule, *, block_length: int | None = None, **options: object
    ) -> None:
        super().__init__(model, **options)
        if block_length is not None and block_length < 1:
            raise ConfigError(f"block_length={block_length} must be at least 1; null fills all positions at once.")
        self.rule, self.block_length = rule, block_length

    def run(
        self, pages: Iterable[Page], *, seed: int, max_rows: int | None, on_launch: OnLaunch | None
    ) -> Iterator[FinishedRow]:
        shared = {"draw": self.draw, "max_rows": max_rows, "device": self.device, "on_launch": on_launch}
        if self.rule.is_fixed and self.block_length is None:
            return run_events(self.denoise, self._plans(pages, seed), **shared)
        return run_selection(
            self.denoise, pages, self.rule, mask_id=self.mask_id, seed=seed, block_length=self.block_length, **shared
        )

    def _plans(self, pages: Iterable[Page], seed: int) -> Iterator[RevealPlan]:
        """Orders that do not look at predictions are known beforehand: the head is then needed at few positions."""
        for index_B, tokens_BL in pages:
            level_BL, token_BL = row_uniforms(seed, index_B.tolist(), tokens_BL.shape[1])
            free_BL = (tokens_BL == self.mask_id).cpu()
            if self.rule.order == "left_to_right":
                level_BL = torch.arange(tokens_BL.shape[1]).expand_as(level_BL)
            rank_BL = ranks(level_BL, free_BL)
            if self.rule.steps is not None:
                event_BL = split_events(rank_BL, free_BL, self.rule.steps)
            else:
                event_BL = torch.where(free_BL, rank_BL.div(self.rule.per_call, rounding_mode="floor"), rank_BL)
            yield RevealPlan(index_B, tokens_BL, event_BL, token_BL)

    def expected_calls(self, free_L: Tensor) -> Calls:
        blocks = free_L.split(self.block_length or len(free_L))
        is_bound = self.rule.per_call is None and self.rule.steps is None
        return Calls(float(sum(self.rule.max_calls(int(block.sum())) for block in blocks)), is_bound=is_bound)
