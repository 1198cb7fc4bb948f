"""Samplers of an adapted model: any given positions, any order, no call that changes nothing.

    result = fill(model, x_BL, given_BL, order="confidence", steps=64, draw=TokenDraw(temperature=0.9), seed=0)

    sampler = build_sampler(model, SamplerOptions(order="random", steps=1024))
    result = sampler.sample(sampler.canvas(8, 256, prefix=[bos_id]))

The network sees no time, so it is called only where positions commit, with its head at those positions only. Every
random number of a row comes from (seed, row number). The released code's two samplers, step by step, are in
``reference_samplers.py``.

Dimensions: B rows, R rows in flight, L positions, P positions with predictions, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from common.config import require_at_least, require_choice
from common.diffusion.absorbing import Denoiser, OnLaunch, RowDenoiser, SampleResult
from common.diffusion.categorical import TokenDraw
from common.diffusion.guidance import GuidedDenoiser
from common.diffusion.nfe import require_steps
from common.diffusion.orders import SelectionRule
from common.diffusion.samplers import DiffusionSampler, FirstHittingSampler, Network, Sampler, SelectionSampler
from common.diffusion.schedules import LogLinear
from common.diffusion.stopping import StopRule
from common.errors import ConfigError
from diffullama.model import DiffusionLM
from diffullama.prefix_cache import PrefixCachedDenoiser

ORDERS = ("random", "first_hitting", "confidence", "entropy", "margin", "left_to_right")
COMMITS = ("auto", "binomial", "fixed")
CACHES = ("none", "prefix")
LIMITS = ("steps", "per_call", "threshold", "entropy_bound")


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """In which order positions are filled, how many at a time, and with what.

    Attributes:
        order: which positions come first. ``random``: every position with equal chance; with ``steps`` the law of the
            released quick-start sampler. ``first_hitting``: its limit of infinitely many steps, one call per position.
            ``confidence``: the most probable draw; ``entropy``: the lowest; ``margin``: the largest gap between the two
            likeliest tokens; ``left_to_right``.
        steps: calls for the whole text, or for each block; None: one position per call, unless another limit is set.
        commit: how many positions a step fills. ``fixed``: equally many, so that calls are min(steps, positions).
            ``binomial``: each with probability 1 / (steps left), order ``random`` only, whose default it is.
        per_call: positions per call.
        threshold: fills all positions whose drawn token has more than this probability, at least the first in order.
        entropy_bound: fills positions in order while they may depend on each other by at most so many nats.
        noise: scale of Gumbel noise on the scores of the order.
        block_length: fills blocks of so many positions from left to right (semi-autoregressive).
        cache: ``none``, or ``prefix``: blocks attend to the keys and values that the text before them had when it was
            complete, and to nothing behind them (``prefix_cache.py``). Fewer tokens per call; exact for a model adapted
            with block-causal attention, an approximation for any other.
        guidance: classifier-free guidance, two evaluations per call; 0: none.
        forbid: ids that are never written; the mask is never written either.
        stop: ids that end a text; what follows is not sampled. Empty: fills everything.
        pad: what positions after the end get; needed with ``stop``.
        draw: how a token is drawn.

    Source: specification 5.5 and 9.2.
    """

    order: str = "confidence"
    steps: int | None = None
    commit: str = "auto"
    per_call: int | None = None
    threshold: float | None = None
    entropy_bound: float | None = None
    noise: float = 0.0
    block_length: int | None = None
    cache: str = "none"
    guidance: float = 0.0
    forbid: Sequence[int] = ()
    stop: Sequence[int] = ()
    pad: int | None = None
    draw: TokenDraw = field(default_factory=TokenDraw)

    def __post_init__(self) -> None:
        require_choice("order", self.order, ORDERS)
        require_choice("commit", self.commit, COMMITS)
        require_choice("cache", self.cache, CACHES)
        require_at_least("guidance", self.guidance, 0)
        if self.steps is not None:
            require_steps(self.steps)
        if self.block_length is not None:
            require_at_least("block_length", self.block_length, 1)
        limits = [name for name in LIMITS if getattr(self, name) is not None]
        if len(limits) > 1:
            raise ConfigError(f"{' and '.join(limits)} exclude each other; set one of {', '.join(LIMITS)}, or none.")
        if self.commit == "binomial" and (self.order != "random" or self.steps is None or self.noise):
            raise ConfigError("commit=binomial needs order=random, steps and no noise; use commit=fixed.")
        if self.order == "first_hitting" and (limits or self.noise or self.block_length or self.commit != "auto"):
            raise ConfigError(
                "order=first_hitting fills one random position per call; leave out steps, commit, per_call, threshold, "
                "entropy_bound, noise and block_length, or use order=random."
            )
        if self.cache == "prefix" and self.block_length is None:
            raise ConfigError("cache=prefix needs block_length: it holds the text before the current block.")
        if self.cache == "prefix" and self.guidance:
            raise ConfigError("cache=prefix and guidance exclude each other; set cache=none or guidance=0.")
        if self.stop and self.pad is None:
            raise ConfigError("stop needs pad, the id of positions after the end; give the model's pad or eos id.")
        if not self.is_binomial and self.order != "first_hitting":
            self.rule()

    @property
    def is_binomial(self) -> bool:
        return self.commit == "binomial" or (
            self.commit == "auto" and self.order == "random" and self.steps is not None and not self.noise
        )

    def rule(self) -> SelectionRule:
        """Which candidates a call keeps; not for ``binomial`` and ``first_hitting``."""
        limits = {name: getattr(self, name) for name in LIMITS if getattr(self, name) is not None}
        return SelectionRule(order=self.order, noise=self.noise, **(limits or {"per_call": 1}))


def without(denoise: Denoiser | RowDenoiser, forbidden: Sequence[int]) -> Denoiser | RowDenoiser:
    """``denoise`` with ids that get probability zero."""
    if not forbidden:
        return denoise

    def allowed(log_probs_PV: Tensor) -> Tensor:
        ids = torch.tensor(sorted(set(forbidden)), device=log_probs_PV.device)
        return log_probs_PV.index_fill(1, ids, -torch.inf).log_softmax(-1)

    if hasattr(denoise, "at_rows"):
        return _Filtered(denoise, allowed)
    return lambda tokens_RL, where_RL: allowed(denoise(tokens_RL, where_RL))


class _Filtered:
    """A ``RowDenoiser`` whose predictions pass through a function."""

    def __init__(self, denoise: RowDenoiser, change) -> None:
        self._denoise, self._change = denoise, change
        self.evaluations_per_call = denoise.evaluations_per_call

    def at_rows(self, tokens_RL: Tensor, where_RL: Tensor, **rows: Tensor) -> Tensor:
        return self._change(self._denoise.at_rows(tokens_RL, where_RL, **rows))


def build_network(
    model: DiffusionLM,
    options: SamplerOptions,
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Network:
    """The model as samplers see it: with the cache, guidance and forbidden ids of ``options``.

    ``context`` is entered around network calls that do not go through ``model.forward`` (the prefix cache's).

    Raises: ConfigError for ids outside the vocabulary.
    """
    for name, ids in (("forbid", options.forbid), ("stop", options.stop), ("pad", [options.pad or 0])):
        for token in ids:
            if not 0 <= token < model.vocab_size:
                raise ConfigError(f"{name}: id {token} is outside the vocabulary 0..{model.vocab_size - 1}.")
    if len({*options.forbid, model.mask_id}) >= model.vocab_size:
        raise ConfigError("forbid leaves no token that could be written; forbid fewer.")
    denoise: Denoiser | RowDenoiser = model.denoise
    if options.cache == "prefix":
        denoise = PrefixCachedDenoiser(model, options.block_length, context)
    elif options.guidance:
        denoise = GuidedDenoiser(denoise, model.mask_id, options.guidance, keep=int(model.shift))
    return Network(without(denoise, options.forbid), model.mask_id, model.vocab_size, model.device)


def build_sampler(
    model: DiffusionLM,
    options: SamplerOptions,
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Sampler:
    """The sampler that ``options`` describes; ``model`` must be in eval mode. ``context``: see ``build_network``.

    With a shifted model position 0 has no prediction and has to be given (a begin-of-text token).
    """
    network = build_network(model, options, context)
    stop = StopRule(ids=tuple(options.stop), fill_id=options.pad) if options.stop else None
    shared: dict[str, Any] = {"draw": options.draw, "stop": stop}
    if options.order == "first_hitting":
        return FirstHittingSampler(network, **shared)
    if options.is_binomial:
        # Linear masking down to t = 0: a masked position commits with probability 1 / (steps left), the last takes all.
        return DiffusionSampler(
            network, LogLinear(), steps=options.steps, eps=0.0, block_length=options.block_length, **shared
        )
    return SelectionSampler(network, options.rule(), block_length=options.block_length, **shared)


def fill(
    model: DiffusionLM,
    x_BL: Tensor,
    given_BL: Tensor,
    *,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    max_rows: int | None = None,
    on_launch: OnLaunch | None = None,
    **options: Any,
) -> SampleResult:
    """Fills every position of ``x_BL`` that is not given; given ones never change, even if they hold the mask id.

    Args:
        model: in eval mode.
        x_BL: int64 ids; what stands at positions that are not given does not matter.
        given_BL: bool (or 0 and 1): prefix, infilling, any set. With a shifted model position 0 must be given.
        seed, rows: row b has the random numbers of (seed, ``rows[b]``), by default of row number b.
        max_rows: rows in one network launch; None: all.
        on_launch: called after every launch.
        options: those of ``SamplerOptions``: order, steps, draw, block_length, stop, ...

    Raises: ConfigError for shapes that differ, a free position 0 with shift, a text that is too long, or bad options.
    """
    known = {option.name for option in fields(SamplerOptions)}
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ConfigError(f"{unknown[0]} is no sampler option; those are {', '.join(sorted(known))}.")
    if x_BL.shape != given_BL.shape or x_BL.dim() != 2:
        raise ConfigError(
            f"x has shape {tuple(x_BL.shape)} and given {tuple(given_BL.shape)}; both must be (rows, positions)."
        )
    sampler = build_sampler(model, SamplerOptions(**options))
    given_BL = given_BL.to(model.device).bool()
    free_BL = ~given_BL
    require_canvas(model, free_BL)
    if options.get("cache", "none") == "prefix":
        require_prefixes(free_BL)
    tokens_BL = torch.where(given_BL, x_BL.to(model.device), model.mask_id)
    return sampler.sample(tokens_BL, free_BL=free_BL, seed=seed, rows=rows, max_rows=max_rows, on_launch=on_launch)


def require_canvas(model: DiffusionLM, free_BL: Tensor) -> None:
    """Raises ConfigError for free positions that the model cannot predict."""
    length = free_BL.shape[1]
    if model.config.model_type == "gpt2" and length > model.max_length:
        raise ConfigError(f"length={length} exceeds the model's {model.max_length} positions; use fewer tokens.")
    if model.shift and length and bool(free_BL[:, 0].any()):
        row = int(free_BL[:, 0].nonzero()[0])
        raise ConfigError(
            f"row {row}: position 0 is not given, but a shifted model does not predict it; begin the text with a "
            "begin-of-text token (bos=true)."
        )


def require_prefixes(free_BL: Tensor) -> None:
    """Raises ConfigError unless given positions come first: a prefix cache does not see what stands behind a block."""
    if bool((free_BL[:, :-1] & ~free_BL[:, 1:]).any()):
        raise ConfigError("cache=prefix does not see tokens that are given behind free ones; use cache=none to infill.")
