"""Samplers of absorbing diffusion as objects: options checked once, then any number of rows.

    network = Network(model.denoise, mask_id, num_tokens, device)
    sampler = DiffusionSampler(network, LogLinear(), steps=1024, draw=TokenDraw(strategy="top_p", para=0.9))
    result = sampler.sample(sampler.canvas(8, 1024, prefix=tokenizer.encode("Once")), seed=0)
    result.tokens_BL, result.nfe, sampler.expected_calls(free_L)

Every random number of a row comes from (seed, row number): neither the batch nor the number of processes matters.
``stream`` takes any number of rows, keeps at most ``max_rows`` of them in flight and yields each as it is completed.

Dimensions: B sequences, L positions, S steps.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common.config import require_choice
from common.diffusion.absorbing import Denoiser, FinishedRow, OnLaunch, RowDenoiser, SampleResult, collect, run_events
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
from common.diffusion.stopping import StopRule
from common.errors import ConfigError

PAGE_ROWS = 256  # waiting rows that are planned at once

Page = tuple[Tensor, ...]
"""(index_B, tokens_BL) or (index_B, tokens_BL, free_BL): row numbers, canvases, and the positions to fill, by default
those that hold the mask id."""


class Calls(NamedTuple):
    """Network evaluations that one row is expected to need; without variance they are certain, or at most that many."""

    mean: float
    variance: float = 0.0
    is_bound: bool = False


@dataclass(frozen=True)
class Network:
    """What samplers use of a model.

    Attributes:
        denoise: see ``absorbing.Denoiser``; a ``RowDenoiser`` has no step-by-step sampler.
        mask_id: id of the mask.
        num_tokens: ids below it, but for the mask, are tokens.
        device: where the model lives.
    """

    denoise: Denoiser | RowDenoiser
    mask_id: int
    num_tokens: int
    device: torch.device

    @property
    def evaluations_per_call(self) -> int:
        """Network evaluations of a row in each of its calls."""
        return getattr(self.denoise, "evaluations_per_call", 1)


class Sampler(ABC):
    """What all samplers share: the network, how tokens are drawn, canvases, and running rows to their end.

    Args:
        network: the model.
        draw: how tokens are drawn; by default unfiltered.
        stop: which tokens end a text; None fills every position.

    Raises: ConfigError for options out of range, here and not in the first call.
    """

    def __init__(self, network: Network, *, draw: TokenDraw | None = None, stop: StopRule | None = None) -> None:
        self.network, self.draw, self.stop = network, draw or TokenDraw(), stop
        self.denoise, self.mask_id, self.device = network.denoise, network.mask_id, network.device
        self.draw.check_vocabulary(network.num_tokens - (network.mask_id < network.num_tokens))

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
        tokens = {"mask_id": self.mask_id, "num_tokens": self.network.num_tokens}
        return build_canvas(size, length, **tokens, device=self.device, **given)

    def sample(
        self,
        tokens_BL: Tensor,
        *,
        free_BL: Tensor | None = None,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        max_rows: int | None = None,
        on_launch: OnLaunch | None = None,
    ) -> SampleResult:
        """Fills the positions of ``free_BL``, by default the masked ones of ``tokens_BL``.

        Row b has the random numbers of row number ``rows[b]``.
        """
        index_B = torch.arange(len(tokens_BL)) if rows is None else torch.as_tensor(list(rows), dtype=torch.int64)
        page = (index_B, tokens_BL) if free_BL is None else (index_B, tokens_BL, free_BL)
        finished = self.run([page], seed=seed, max_rows=max_rows, on_launch=on_launch)
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

    def expected_calls(self, free_L: Tensor) -> Calls:
        """Network evaluations of one row whose free positions are marked in ``free_L``; a bound with a stop rule."""
        mean, variance, is_bound = self.calls(free_L)
        each = self.network.evaluations_per_call
        return Calls(each * mean, each**2 * variance, is_bound or self.stop is not None)

    @abstractmethod
    def calls(self, free_L: Tensor) -> Calls:
        """Calls of one row that nothing stops early."""


class PlannedSampler(Sampler):
    """Samplers whose reveal order does not depend on the network's output."""

    @abstractmethod
    def events(self, level_BL: Tensor, free_BL: Tensor, index_B: Tensor, seed: int) -> Tensor:
        """The call in which each position is revealed."""

    def run(
        self, pages: Iterable[Page], *, seed: int, max_rows: int | None, on_launch: OnLaunch | None
    ) -> Iterator[FinishedRow]:
        def plans() -> Iterator[RevealPlan]:
            for index_B, tokens_BL, *free in pages:
                level_BL, token_BL = row_uniforms(seed, index_B.tolist(), tokens_BL.shape[1])
                free_BL = (free[0] if free else tokens_BL == self.mask_id).cpu()
                yield RevealPlan(index_B, tokens_BL, self.events(level_BL, free_BL, index_B, seed), token_BL)

        shared = {"draw": self.draw, "max_rows": max_rows, "device": self.device, "stop": self.stop}
        return run_events(self.denoise, plans(), on_launch=on_launch, **shared)


class DiffusionSampler(PlannedSampler):
    """Reverse diffusion over a time grid: ``tweedie`` or ``euler``, exact, one call per step that reveals something.

    Args:
        network, draw, stop: see ``Sampler``.
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
        network: Network,
        noise: Schedule,
        *,
        method: str = "tweedie",
        steps: int = 1024,
        eps: float = DEFAULT_EPS,
        block_length: int | None = None,
        event_driven: bool = True,
        **options: object,
    ) -> None:
        super().__init__(network, **options)
        require_choice("method", method, METHODS)
        require_steps(steps)
        if event_driven and self.draw.precision == "float16-compat":
            raise ConfigError(
                "precision=float16-compat repeats the reference's one-stage draw; set sampler=stepwise, or use "
                "precision=float64 or float32."
            )
        if block_length is not None and (block_length < 1 or not event_driven):
            raise ConfigError(f"block_length={block_length} must be at least 1 and needs sampler=event.")
        if not event_driven and (self.stop is not None or hasattr(self.denoise, "at_rows")):
            raise ConfigError("sampler=stepwise has no stop rule, guidance or cache; use sampler=event.")
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
        for index_B, tokens_BL, *_ in pages:
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

    def calls(self, free_L: Tensor) -> Calls:
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

    def calls(self, free_L: Tensor) -> Calls:
        return Calls(float(free_L.sum()))


class OrderedSampler(PlannedSampler):
    """Any-order autoregressive sampling: fills masked positions in a given order and passes over given ones.

    Args:
        network, draw, stop: see ``Sampler``.
        order: ``random`` (a new permutation for every row), ``random_shared`` (one for all, the reference's default),
            ``forward``, ``backward``, a permutation, or one permutation per row number.
        per_call: positions filled by each call, as if they were independent.
    """

    def __init__(
        self, network: Network, order: str | Sequence | Tensor = "random", *, per_call: int = 1, **options: object
    ) -> None:
        super().__init__(network, **options)
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

    def calls(self, free_L: Tensor) -> Calls:
        return Calls(float(math.ceil(int(free_L.sum()) / self.per_call)))


class SelectionSampler(Sampler):
    """Parallel decoding: several positions per call, chosen by confidence, margin, entropy, at random or from the left.

    Not the law of the diffusion. Args: ``rule`` (``common/diffusion/orders.py``) and ``block_length``; the others are
    those of ``Sampler``.
    """

    def __init__(
        self, network: Network, rule: SelectionRule, *, block_length: int | None = None, **options: object
    ) -> None:
        super().__init__(network, **options)
        if block_length is not None and block_length < 1:
            raise ConfigError(f"block_length={block_length} must be at least 1; null fills all positions at once.")
        self.rule, self.block_length = rule, block_length

    def run(
        self, pages: Iterable[Page], *, seed: int, max_rows: int | None, on_launch: OnLaunch | None
    ) -> Iterator[FinishedRow]:
        shared = {"draw": self.draw, "max_rows": max_rows, "device": self.device, "stop": self.stop}
        shared["on_launch"] = on_launch
        if self.rule.is_fixed and self.block_length is None:
            return run_events(self.denoise, self._plans(pages, seed), **shared)
        return run_selection(
            self.denoise, pages, self.rule, mask_id=self.mask_id, seed=seed, block_length=self.block_length, **shared
        )

    def _plans(self, pages: Iterable[Page], seed: int) -> Iterator[RevealPlan]:
        """Orders that do not look at predictions are known beforehand: the head is then needed at few positions."""
        for index_B, tokens_BL, *free in pages:
            level_BL, token_BL = row_uniforms(seed, index_B.tolist(), tokens_BL.shape[1])
            free_BL = (free[0] if free else tokens_BL == self.mask_id).cpu()
            if self.rule.order == "left_to_right":
                level_BL = torch.arange(tokens_BL.shape[1]).expand_as(level_BL)
            rank_BL = ranks(level_BL, free_BL)
            if self.rule.steps is not None:
                event_BL = split_events(rank_BL, free_BL, self.rule.steps)
            else:
                event_BL = torch.where(free_BL, rank_BL.div(self.rule.per_call, rounding_mode="floor"), rank_BL)
            yield RevealPlan(index_B, tokens_BL, event_BL, token_BL)

    def calls(self, free_L: Tensor) -> Calls:
        blocks = free_L.split(self.block_length or len(free_L))
        is_bound = self.rule.per_call is None and self.rule.steps is None
        return Calls(float(sum(self.rule.max_calls(int(block.sum())) for block in blocks)), is_bound=is_bound)
