"""The two samplers of the released code, step by step, with or without the calls that change nothing.

Both start from a sequence with a mask at every position that is not given, and make T *steps*: each predicts a token y
and its log-probability s for every position, then some masked positions commit their y; after the last step all do.

* ``random``: a masked position commits in step c with probability 1 / (T - c), independently (specification 5.2);
* ``confidence``: of the n positions that were masked at first, the floor(n (T - 1 - c) / T) least likely draws stay
  masked (5.3). Draws are made anew in every step, also where a token is committed already, and all are ranked.

The network sees no time. So it need be called in the random order only in steps in which a row commits, and in the
confidence order only for rows that have changed (``cache=True``). Noise belongs to a step, not to a call, so the tokens
are the same either way. Samplers for use rather than comparison: ``diffullama/sampler.py``.

Dimensions: T steps, B rows, R rows of one call, L positions, P positions with predictions, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.config import require_at_least, require_choice
from common.diffusion.categorical import draw_tokens
from common.errors import ConfigError
from common.seeding import generator
from diffullama.filters import lowest_k, require_top_p, top_k_filter, top_p_filter

ORDERS = ("random", "confidence")
DRAWS = ("sample", "greedy")
GIVEN_SCORE = 1000.0  # given positions are never among the least likely
NOISE_STEPS = 32  # steps whose uniforms are drawn at once


@dataclass(frozen=True)
class ReferenceSample:
    """Samples, how they came about, and the cost. Unpacks as ``tokens, model_inputs, n_calls``.

    Attributes:
        tokens: int64 ``(B, L)``; with shift ``(B, L - 1)``, without the first column, as in the released code.
        model_inputs: the sequences that each step predicts from, ``(T, B, L)``; None without ``trace``.
        n_calls: network launches, each over the rows that need one.
        calls_B: network evaluations of each row.
    """

    tokens: Tensor
    model_inputs: Tensor | None
    n_calls: int
    calls_B: Tensor

    def __iter__(self) -> Iterator[object]:
        return iter((self.tokens, self.model_inputs, self.n_calls))


@torch.no_grad()
def sample(
    model: nn.Module,
    x: Tensor,
    src_mask: Tensor,
    steps: int = 64,
    order: str = "confidence",
    draw: str = "sample",
    temp: float = 1.0,
    top_p: float | None = None,
    shift: bool = True,
    gumbel: Tensor | None = None,
    u: Tensor | None = None,
    cache: bool = True,
    trace: bool = True,
    *,
    top_k: int | None = None,
    score_noise: float = 0.0,
    forbid: Collection[int] = (),
    seed: int = 0,
    rows: Sequence[int] | None = None,
) -> ReferenceSample:
    """Fills the positions where ``src_mask`` is 0 by one of the released code's samplers.

    Args:
        model: a ``DiffusionLM``, called as ``model(tokens) -> logits (R, L, V)``; its mask id marks masked positions.
        x: ids ``(B, L)``; only given positions are read, and with shift position 0, which has no prediction: if it is
            not given it is masked too and commits ``x[:, 0]``.
        src_mask: 1 at given positions, ``(B, L)``.
        steps: T.
        order: ``random`` or ``confidence``.
        draw: ``sample``, or ``greedy``: the likeliest token.
        temp: logits are divided by it; 0 is greedy.
        top_p, top_k: filters after the temperature; None: none. (The released confidence sampler has none.)
        shift: whether logits at position i predict the token at i + 1; that of the model.
        gumbel: Gumbel noise of the draws, ``(T, B, L, V)``, at the position whose logits it is added to. None: draws by
            inversion from generators of (seed, row number).
        u: uniforms of the commits, ``(T - 1, B, L)``: of the random order, or of ``score_noise``. None: generators.
        cache: whether calls that change nothing are left out.
        trace: whether to keep ``model_inputs``.
        score_noise: scale of Gumbel noise on the scores of the confidence order.
        forbid: ids that are never drawn. The released code forbids none, and so can draw the mask id, which then is a
            token; pass ``[mask_id]`` against that.
        seed, rows: without ``gumbel`` or ``u``: a row's noise depends on the seed and its number (0, 1, ...) only.

    Source: specification 5.1 to 5.3; golden cases ``decode_*``. Raises: ConfigError for options out of range.
    """
    steps = _check(x, src_mask, steps, order, draw, temp, top_p, shift, model)
    device = getattr(model, "device", x.device)
    x, src_mask = x.to(device), src_mask.to(device)
    predictor = _Predictor(model, shift, float(temp), top_p, top_k, tuple(forbid), draw == "greedy" or temp == 0)
    noise = _Noise(gumbel, u, seed, range(len(x)) if rows is None else rows, x.shape[1])
    run = _random_order if order == "random" else _confidence_order
    free_BL = src_mask == 0
    tokens_BL = torch.where(free_BL, model.mask_id, x)
    state = _State(x, tokens_BL, free_BL, torch.zeros(len(x), dtype=torch.int64), inputs=[] if trace else None)
    run(predictor, noise, state, steps, cache, score_noise)
    return ReferenceSample(
        state.tokens_BL[:, 1:] if shift else state.tokens_BL,
        torch.stack(state.inputs) if trace else None,
        state.launches,
        state.calls_B,
    )


def _check(
    x: Tensor,
    src_mask: Tensor,
    steps: int,
    order: str,
    draw: str,
    temp: float,
    top_p: float | None,
    shift: bool,
    model: nn.Module,
) -> int:
    """Raises ConfigError for anything out of range; returns ``steps`` as an integer."""
    if x.shape != src_mask.shape or x.dim() != 2:
        raise ConfigError(
            f"x has shape {tuple(x.shape)} and src_mask {tuple(src_mask.shape)}; both must be (rows, positions)."
        )
    require_at_least("steps", steps, 1)
    require_choice("order", order, ORDERS)
    require_choice("draw", draw, DRAWS)
    if not 0 <= temp < float("inf"):
        raise ConfigError(f"temp={temp} must be positive, or 0 for greedy draws.")
    if top_p is not None:
        require_top_p(top_p)
    if getattr(model, "shift", shift) != shift:
        raise ConfigError(f"shift={shift}, but the model was adapted with shift={model.shift}; pass that.")
    return int(steps)


@dataclass
class _State:
    """What changes from step to step."""

    x: Tensor
    tokens_BL: Tensor
    masked_BL: Tensor
    calls_B: Tensor
    launches: int = 0
    inputs: list[Tensor] | None = None

    def record(self) -> None:
        if self.inputs is not None:
            self.inputs.append(self.tokens_BL.clone())

    def commit(self, where_BL: Tensor, drawn_BL: Tensor) -> None:
        self.tokens_BL = torch.where(where_BL, drawn_BL, self.tokens_BL)
        self.masked_BL = self.masked_BL & ~where_BL


@dataclass(frozen=True)
class _Predictor:
    """Log-probabilities of the tokens at chosen positions, and draws from them."""

    model: nn.Module
    shift: bool
    temp: float
    top_p: float | None
    top_k: int | None
    forbid: tuple[int, ...]
    greedy: bool

    def predicted(self, where_BL: Tensor) -> Tensor:
        """Positions of ``where_BL`` that the network predicts: with shift all but the first."""
        if self.shift:
            where_BL = where_BL.clone()
            where_BL[:, :1] = False
        return where_BL

    def log_probs(self, state: _State, rows_R: Tensor, where_RL: Tensor) -> Tensor:
        """``(P, V)`` after temperature and filters, by one call on the rows ``rows_R``."""
        state.launches += 1
        state.calls_B[rows_R.cpu()] += 1
        tokens_RL = state.tokens_BL[rows_R]
        if self.model.mask_id in self.forbid and hasattr(self.model, "denoise"):
            logits_PV = self.model.denoise(tokens_RL, where_RL)  # the head at those positions only
        else:
            logits_RLV = self.model(tokens_RL)
            row_P, position_P = where_RL.nonzero(as_tuple=True)
            logits_PV = logits_RLV[row_P, position_P - 1 if self.shift else position_P]
        if self.forbid:
            logits_PV = logits_PV.index_fill(1, torch.tensor(self.forbid, device=logits_PV.device), -torch.inf)
        if self.temp not in (0.0, 1.0):
            logits_PV = logits_PV / self.temp
        if self.top_k is not None:
            logits_PV = top_k_filter(logits_PV, self.top_k)
        if self.top_p is not None:
            logits_PV = top_p_filter(logits_PV, self.top_p)
        return logits_PV.log_softmax(-1)

    def draw(self, log_probs_PV: Tensor, noise: "_Noise", step: int, where_BL: Tensor) -> tuple[Tensor, Tensor]:
        """(token, its log-probability) at the positions of ``where_BL``, row-major."""
        if self.greedy:
            token_P = log_probs_PV.argmax(-1)
        else:
            token_P = noise.draw(log_probs_PV, step, where_BL, self.shift)
        return token_P, log_probs_PV.gather(-1, token_P[:, None]).squeeze(-1)


class _Noise:
    """The random numbers of each step: given, or from one generator per row and ``NOISE_STEPS`` steps."""

    def __init__(self, gumbel: Tensor | None, u: Tensor | None, seed: int, rows: Sequence[int], length: int) -> None:
        self._gumbel, self._u, self._seed, self._rows, self._length = gumbel, u, seed, list(rows), length
        self._drawn: dict[str, tuple[int, Tensor]] = {}

    def draw(self, log_probs_PV: Tensor, step: int, where_BL: Tensor, shift: bool) -> Tensor:
        if self._gumbel is None:
            uniform_P = self._uniforms("token", step).to(log_probs_PV.device)[where_BL]
            return draw_tokens(log_probs_PV, uniform_P)
        row_P, position_P = where_BL.nonzero(as_tuple=True)
        gumbel_PV = self._gumbel[step].to(log_probs_PV.device)[row_P, position_P - 1 if shift else position_P]
        return (log_probs_PV + gumbel_PV).argmax(-1)

    def commit(self, step: int, device: torch.device) -> Tensor:
        """Uniforms ``(B, L)``."""
        return (self._uniforms("commit", step) if self._u is None else self._u[step]).to(device)

    def _uniforms(self, purpose: str, step: int) -> Tensor:
        page, offset = divmod(step, NOISE_STEPS)
        if self._drawn.get(purpose, (-1,))[0] != page:
            shape = (NOISE_STEPS, self._length)
            draws = [
                torch.rand(shape, dtype=torch.float64, generator=generator(self._seed, purpose, row, page))
                for row in self._rows
            ]
            self._drawn[purpose] = (page, torch.stack(draws, dim=1))
        return self._drawn[purpose][1][offset]


def _random_order(
    predictor: _Predictor, noise: _Noise, state: _State, steps: int, cache: bool, score_noise: float
) -> None:
    if score_noise:
        raise ConfigError(f"score_noise={score_noise} belongs to order=confidence; leave it out for order=random.")
    for step in range(steps):
        state.record()
        now_BL = state.masked_BL
        if step < steps - 1:
            now_BL = now_BL & (noise.commit(step, now_BL.device) < 1 / (steps - step))
        where_BL = predictor.predicted(now_BL)
        called_B = where_BL.any(1) if cache else torch.ones_like(where_BL[:, 0])
        drawn_BL = state.x.clone()  # with shift this is what position 0 commits
        if bool(called_B.any()):
            rows_R = called_B.nonzero().squeeze(1)
            log_probs_PV = predictor.log_probs(state, rows_R, where_BL[rows_R])
            drawn_BL[where_BL] = predictor.draw(log_probs_PV, noise, step, where_BL)[0]
        state.commit(now_BL, drawn_BL)


def _confidence_order(
    predictor: _Predictor, noise: _Noise, state: _State, steps: int, cache: bool, score_noise: float
) -> None:
    free_BL, shift = state.masked_BL, predictor.shift
    total_B = free_BL.sum(1)
    where_BL = predictor.predicted(free_BL)
    if shift and free_BL.shape[1] > 1:
        where_BL[:, 1] |= free_BL[:, 0]  # a free position 0 has the score of position 1
    log_probs_BLV: Tensor | None = None
    stale_B = torch.ones_like(total_B, dtype=torch.bool)
    for step in range(steps):
        state.record()
        called_B = (stale_B & (state.masked_BL & where_BL).any(1)) if cache else torch.ones_like(stale_B)
        if bool(called_B.any()):
            rows_R = called_B.nonzero().squeeze(1)
            log_probs_PV = predictor.log_probs(state, rows_R, where_BL[rows_R])
            if log_probs_BLV is None:
                log_probs_BLV = log_probs_PV.new_zeros(*free_BL.shape, log_probs_PV.shape[-1])
            log_probs_BLV[where_BL & called_B[:, None]] = log_probs_PV
        drawn_BL = state.x.clone()
        score_BL = torch.full(free_BL.shape, GIVEN_SCORE, device=free_BL.device)
        if log_probs_BLV is not None:
            token_P, score_P = predictor.draw(log_probs_BLV[where_BL], noise, step, where_BL)
            drawn_BL[where_BL] = token_P
            score_BL = score_BL.to(score_P.dtype).masked_scatter(where_BL, score_P)
            if shift:
                score_BL[:, 0] = score_BL[:, 1] if free_BL.shape[1] > 1 else GIVEN_SCORE
            score_BL = score_BL.masked_fill(~free_BL, GIVEN_SCORE)
        now_BL = state.masked_BL
        if step < steps - 1:
            stay_B = (total_B * ((steps - 1 - step) / steps)).long()  # the float32 product of the released code
            u = noise.commit(step, free_BL.device) if score_noise else None
            now_BL = now_BL & ~lowest_k(score_BL, stay_B, u, score_noise)
        state.commit(now_BL, drawn_BL)
        stale_B = now_BL.any(1)
