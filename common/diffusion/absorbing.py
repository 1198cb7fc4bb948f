"""Event-driven sampling of absorbing diffusion with any denoiser that does not see the time.

A network that sees only the partly masked tokens has to be called only when a position is revealed. Plans
(``common/diffusion/reveal.py``) say beforehand which call reveals what, so a row visits its non-empty steps only: there
is no loop over the time grid and no cache, the head is computed at revealed positions only, and rows need not be in
step. Rows that finish make room for waiting ones (continuous batching). This is exactly the law of the stepwise sampler
(``common/diffusion/stepwise.py``), and covers Tweedie, Euler, first-hitting, any-order and fixed-count sampling.

Dimensions: B sequences in all, R sequences in flight, L positions, P positions revealed in one launch, V vocabulary.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from common.config import require_at_least
from common.diffusion.categorical import TokenDraw, draw_tokens
from common.diffusion.nfe import DEFAULT_EPS, reveal_distribution, update_rate
from common.diffusion.reveal import (
    AFTER_STOP,
    GIVEN,
    RevealPlan,
    dense_events,
    diffusion_events,
    ordered_events,
    row_uniforms,
)
from common.diffusion.schedules import Schedule
from common.diffusion.stopping import StopRule

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``denoise(tokens_RL int64, where_RL bool) -> (P, V)`` float32 log-probabilities at the positions of ``where_RL`` in
row-major order, for any subset of rows; the mask's column is -inf, so that it can never be drawn."""


class RowDenoiser(Protocol):
    """A denoiser that has to know its rows, for guidance or caches; used in place of a ``Denoiser``.

    Attributes:
        evaluations_per_call: network row evaluations that one call of a row costs.
    """

    evaluations_per_call: int

    def at_rows(self, tokens_RL: Tensor, where_RL: Tensor, *, index_R: Tensor, given_RL: Tensor) -> Tensor:
        """As a ``Denoiser``, with the rows' numbers (CPU) and which of their positions are given."""


OnLaunch = Callable[[Tensor, Tensor], None]
"""Called after every launch with (index_R, tokens_RL); for progress and views, must not modify its arguments."""


class UniformSource(Protocol):
    """Uniforms in [0, 1) from outside; indices are (step, row number, position) triples in row-major order."""

    def update(self, step_P: Tensor, row_P: Tensor, position_P: Tensor) -> Tensor:
        """One uniform per position, which decides whether the position is unmasked in this step."""

    def token(self, step_P: Tensor, row_P: Tensor, position_P: Tensor, columns: int) -> Tensor:
        """``(P,)`` uniforms for inversion or ``(P, <= columns)`` uniforms for a race (``categorical.draw_tokens``)."""


@dataclass
class FinishedRow:
    """One sampled sequence, handed out as soon as it is complete.

    Attributes:
        index: the row's number.
        tokens_L: ids, on the CPU; no mask is left.
        calls: network evaluations of this row.
        revealed_L: the call (from 0) that revealed each position, ``GIVEN`` (-1) where the token was given,
            ``AFTER_STOP`` (-2) where it was filled in because the text had ended.
        launches: launches of the whole run up to this row's end.
        seconds: from the row's admission to its end.
    """

    index: int
    tokens_L: Tensor
    calls: int
    revealed_L: Tensor
    launches: int
    seconds: float


@dataclass
class SampleResult:
    """Samples and what they cost.

    Attributes:
        tokens_BL: ids; no mask is left.
        calls_B: network evaluations of each row.
        launches: network launches, each over all rows in flight.
        seconds: wall time of the run.
        steps: steps of the time grid; None for samplers without one.
        revealed_BL: the call that revealed each position (from 0), ``GIVEN`` or ``AFTER_STOP``;
            ``reveal.event_states`` replays a row from it.
    """

    tokens_BL: Tensor
    calls_B: Tensor
    launches: int
    seconds: float
    steps: int | None = None
    revealed_BL: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))

    @property
    def nfe(self) -> float:
        """Network row evaluations per row."""
        return float(self.calls_B.double().mean()) if len(self.calls_B) else 0.0


class RowsInFlight:
    """At most ``max_rows`` rows that are being sampled, refilled from pages of waiting ones.

    Attributes:
        index_R: row numbers (CPU).
        calls_R: calls done for each row (CPU).
        fields: tensors by name whose first dimension is R.
        admitted: time of admission of each row, seconds.

    Args:
        pages: pairs (index_B, fields).
        max_rows: see above; None admits one page at a time.
        evaluations_per_call: network evaluations of a row in each of its calls.
        fill_id: what positions after a stop token get.
    """

    def __init__(
        self,
        pages: Iterable[tuple[Tensor, dict[str, Tensor]]],
        max_rows: int | None,
        *,
        evaluations_per_call: int = 1,
        fill_id: int | None = None,
    ) -> None:
        if max_rows is not None:
            require_at_least("max_rows", max_rows, 1)
        self._pages = iter(pages)
        self._page: tuple[Tensor, dict[str, Tensor]] | None = None
        self._next = 0
        self._max_rows = max_rows
        self._evaluations_per_call, self._fill_id = evaluations_per_call, fill_id
        self.index_R = torch.empty(0, dtype=torch.int64)
        self.calls_R = torch.empty(0, dtype=torch.int64)
        self.fields: dict[str, Tensor] = {}
        self.admitted: list[float] = []

    def __len__(self) -> int:
        return len(self.index_R)

    def refill(self) -> None:
        """Admits waiting rows until ``max_rows`` are in flight or none waits (no bound: one page at a time)."""
        while self._max_rows is None or len(self) < self._max_rows:
            if self._page is None or self._next >= len(self._page[0]):
                if self._max_rows is None and len(self):
                    return
                self._page, self._next = next(self._pages, None), 0
                if self._page is None:
                    return
                continue
            index_B, fields = self._page
            room = len(index_B) if self._max_rows is None else self._max_rows - len(self)
            chosen = slice(self._next, self._next + room)
            new_R = index_B[chosen]
            self._next += len(new_R)
            self.index_R = torch.cat([self.index_R, new_R])
            self.calls_R = torch.cat([self.calls_R, torch.zeros_like(new_R)])
            self.admitted += [time.perf_counter()] * len(new_R)
            for name, value in fields.items():
                held = self.fields.get(name)
                self.fields[name] = value[chosen].clone() if held is None else torch.cat([held, value[chosen]])

    def retire(self, done_R: Tensor, launches: int) -> Iterator[FinishedRow]:
        """Removes and yields the rows marked in ``done_R`` (CPU bool)."""
        if not bool(done_R.any()):
            return
        now = time.perf_counter()
        rows = done_R.nonzero().squeeze(1)
        at = rows.to(self.fields["tokens"].device)
        tokens_RL, revealed_RL = self.fields["tokens"][at].cpu(), self.fields["event"][at].cpu()
        if self._fill_id is not None:
            tokens_RL[revealed_RL == AFTER_STOP] = self._fill_id
        for place, row in enumerate(rows.tolist()):
            yield FinishedRow(
                int(self.index_R[row]),
                tokens_RL[place],
                int(self.calls_R[row]) * self._evaluations_per_call,
                revealed_RL[place],
                launches,
                now - self.admitted[row],
            )
        keep = (~done_R).nonzero().squeeze(1)
        kept_at = keep.to(at.device)
        self.index_R, self.calls_R = self.index_R[keep], self.calls_R[keep]
        self.admitted = [self.admitted[row] for row in keep.tolist()]
        self.fields = {name: value[kept_at.to(value.device)] for name, value in self.fields.items()}


def predict(
    denoise: Denoiser | RowDenoiser, tokens_RL: Tensor, where_RL: Tensor, index_R: Tensor, given_RL: Tensor
) -> Tensor:
    """Log-probabilities ``(P, V)`` at the positions, by either kind of denoiser."""
    if hasattr(denoise, "at_rows"):
        return denoise.at_rows(tokens_RL, where_RL, index_R=index_R, given_RL=given_RL)
    return denoise(tokens_RL, where_RL)


def run_events(
    denoise: Denoiser | RowDenoiser,
    plans: Iterable[RevealPlan],
    *,
    draw: TokenDraw | None = None,
    max_rows: int | None = None,
    uniforms: UniformSource | None = None,
    device: torch.device | str | None = None,
    stop: StopRule | None = None,
    on_launch: OnLaunch | None = None,
) -> Iterator[FinishedRow]:
    """Executes plans and yields every row as it is completed; rows without free positions cost no call.

    Args:
        denoise: the network.
        plans: pages of rows, read only as rows are needed, so that a long queue need not be held in memory.
        draw: how tokens are drawn.
        max_rows: rows in flight; None runs each page as one batch.
        uniforms: replaces the plans' own token uniforms; steps are the row's calls.
        device: where the network lives; by default that of the plans' tokens.
        stop: which tokens end a text; None fills every position.
        on_launch: called after every launch.
    """
    draw = draw or TokenDraw()

    def pages() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for plan in plans:
            tensors = {"tokens": plan.tokens_BL, "event": plan.event_BL, "uniform": plan.uniform_BL}
            on_device = {name: value.to(device or value.device) for name, value in tensors.items()}
            yield plan.index_B, on_device | {"total": plan.calls_B}

    rows = RowsInFlight(
        pages(),
        max_rows,
        evaluations_per_call=getattr(denoise, "evaluations_per_call", 1),
        fill_id=None if stop is None else stop.fill_id,
    )
    launches = 0
    while True:
        rows.refill()
        if not len(rows):
            return
        done_R = rows.calls_R >= rows.fields["total"]
        if bool(done_R.any()):
            yield from rows.retire(done_R, launches)
            continue
        tokens_RL, event_RL = rows.fields["tokens"], rows.fields["event"]
        where_RL = event_RL == rows.calls_R.to(event_RL.device).unsqueeze(1)
        with torch.no_grad():
            log_probs_PV = predict(denoise, tokens_RL, where_RL, rows.index_R, event_RL == GIVEN)
            if uniforms is None:
                uniform = rows.fields["uniform"][where_RL]
            else:
                row_P, position_P = (index.cpu() for index in where_RL.nonzero(as_tuple=True))
                uniform = uniforms.token(rows.calls_R[row_P], rows.index_R[row_P], position_P, log_probs_PV.shape[-1])
            tokens_RL[where_RL] = draw_tokens(log_probs_PV, uniform.to(log_probs_PV.device), draw)
        if stop is not None:
            _skip_after_stop(rows, stop)
        rows.calls_R += 1
        launches += 1
        if on_launch is not None:
            on_launch(rows.index_R, tokens_RL)


def _skip_after_stop(rows: RowsInFlight, stop: StopRule) -> None:
    """Takes the positions behind a stop token out of the plans, and closes the gaps in the numbers of later calls."""
    tokens_RL, event_RL = rows.fields["tokens"], rows.fields["event"]
    now_R1 = rows.calls_R.to(event_RL.device).unsqueeze(1)
    later_RL = event_RL > now_R1
    skipped_RL = later_RL & stop.behind(tokens_RL, (event_RL >= 0) & ~later_RL)
    changed_R = skipped_RL.any(1)
    if not bool(changed_R.any()):
        return
    event_RL = torch.where(skipped_RL, AFTER_STOP, event_RL)
    later_RL = later_RL & ~skipped_RL & changed_R[:, None]
    event_RL = torch.where(later_RL, now_R1 + 1 + dense_events(event_RL, later_RL), event_RL)
    rows.fields["event"] = event_RL
    rows.fields["total"] = torch.where(changed_R.cpu(), event_RL.amax(1).cpu() + 1, rows.fields["total"])


def collect(
    finished: Iterable[FinishedRow], index_B: Tensor, tokens_BL: Tensor, steps: int | None = None
) -> SampleResult:
    """Runs a sampler to its end and puts the rows in the order of ``index_B``; ``tokens_BL`` fixes shape and device."""
    started = time.perf_counter()
    by_index = {row.index: row for row in finished}
    seconds = time.perf_counter() - started
    ordered = [by_index[index] for index in index_B.tolist()]
    shape, device = tokens_BL.shape, tokens_BL.device
    return SampleResult(
        tokens_BL=torch.stack([row.tokens_L for row in ordered]).to(device) if ordered else tokens_BL.clone(),
        calls_B=torch.tensor([row.calls for row in ordered], dtype=torch.int64),
        launches=max((row.launches for row in ordered), default=0),
        seconds=seconds,
        steps=steps,
        revealed_BL=torch.stack([row.revealed_L for row in ordered])
        if ordered
        else torch.empty(shape, dtype=torch.int64),
    )


def plan_rows(
    tokens_BL: Tensor,
    event_BL: Tensor,
    token_uniform_BL: Tensor,
    rows: Sequence[int] | None = None,
) -> RevealPlan:
    """A plan from its parts; ``rows`` are the row numbers (by default 0, 1, ...)."""
    index_B = torch.arange(len(tokens_BL)) if rows is None else torch.as_tensor(list(rows), dtype=torch.int64)
    return RevealPlan(index_B, tokens_BL, event_BL.to(tokens_BL.device), token_uniform_BL.to(tokens_BL.device))


def sample_event_driven(
    denoise: Denoiser,
    tokens_BL: Tensor,
    *,
    mask_id: int,
    schedule: Schedule | None = None,
    method: str = "tweedie",
    steps: int | None = None,
    eps: float = DEFAULT_EPS,
    draw: TokenDraw | None = None,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    uniforms: tuple[Tensor, Tensor] | None = None,
    block_length: int | None = None,
    max_rows: int | None = None,
    on_launch: OnLaunch | None = None,
) -> SampleResult:
    """Fills the masked positions by reverse diffusion in exactly as many calls as there are steps with a change.

    Args:
        denoise: the network.
        tokens_BL: ids with ``mask_id`` at the positions to fill; given positions never change.
        mask_id: the mask.
        schedule: noise schedule; needed with ``steps``.
        method: ``tweedie`` or ``euler``.
        steps: steps of the time grid; None stands for infinitely many (first-hitting: one call per token).
        eps: time at which the grid ends.
        draw: how tokens are drawn.
        seed: random numbers depend on it and the row numbers only, so the other rows do not matter.
        rows: row numbers, by default 0, 1, ...
        uniforms: (reveal_BL, token_BL) in place of those derived from ``seed``.
        block_length: fills blocks of so many positions from left to right.
        max_rows: rows in flight; None runs all at once.
        on_launch: called after every launch.

    Source: RADD (Ou et al., 2024), sampling without redundant calls, with all reveal times drawn in advance.
    """
    reveal_S = None if steps is None else reveal_distribution(update_rate(schedule, method, steps, eps))
    row_numbers = range(len(tokens_BL)) if rows is None else rows
    reveal_BL, token_BL = uniforms or row_uniforms(seed, row_numbers, tokens_BL.shape[1])
    event_BL = diffusion_events(reveal_BL, (tokens_BL == mask_id).to(reveal_BL.device), reveal_S, block_length)
    plan = plan_rows(tokens_BL, event_BL, token_BL, row_numbers)
    return collect(
        run_events(denoise, [plan], draw=draw, max_rows=max_rows, on_launch=on_launch), plan.index_B, tokens_BL, steps
    )


def sample_ordered(
    denoise: Denoiser,
    tokens_BL: Tensor,
    order: Tensor,
    *,
    mask_id: int,
    per_call: int = 1,
    draw: TokenDraw | None = None,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    uniforms: UniformSource | None = None,
    max_rows: int | None = None,
    on_launch: OnLaunch | None = None,
) -> SampleResult:
    """Fills the masked positions in ``order``, one call per ``per_call`` positions; given positions are passed over.

    Args:
        order: ``(L,)`` or ``(B, L)``, permutations of 0..L-1 (``orders.check_order``).
        uniforms: replaces the per-row uniforms; steps are the row's calls.

    Other arguments as in ``sample_event_driven``.
    """
    row_numbers = range(len(tokens_BL)) if rows is None else rows
    _, token_BL = row_uniforms(seed, row_numbers, tokens_BL.shape[1])
    plan = plan_rows(tokens_BL, ordered_events(order, tokens_BL == mask_id, per_call), token_BL, row_numbers)
    finished = run_events(denoise, [plan], draw=draw, max_rows=max_rows, uniforms=uniforms, on_launch=on_launch)
    return collect(finished, plan.index_B, tokens_BL)
