"""Tokens of new networks from their prototypes, with noise that belongs to the network and not to the batch.

The noise of a network is a function of its seed and of blocks of 16 tokens, so neither the rows of a pass, nor the
networks drawn together, nor the number of processes changes a network (beyond rounding). The projections of the
prototypes are computed once per token and those of the time once per step, instead of both in every evaluation.

Dimensions: n networks, L tokens, D values, P width of a prototype, R rows of a pass.
"""

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.config import require_at_least, require_choice
from common.errors import ConfigError
from common.seeding import generator
from rpg import samplers
from rpg.model import Generator

NOISE_BLOCK = 16  # tokens that share a stream of noise
PADDINGS = ("zero", "free")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How tokens are drawn. ``ddpm`` and ``ddim`` are the released samplers, the others need few evaluations."""

    kind: Literal["trailing", "ddpm", "ddim", "dpm_solver_sde", "heun"] = "trailing"
    steps: int = 50  # not used by ddpm, which takes all; evaluations, but heun needs two a step
    eta: float = 1.0  # share of fresh noise of trailing and ddim (released: 0.05)
    grid: Literal["linear", "quadratic"] = "linear"  # of ddim
    churn: float = 0.5  # of heun: growth of the noise level before each step
    guidance: float = 1.0  # classifier-free guidance; 1: none
    # positions without a value: zero holds them at the 0 that they had in training, free lets them drift (released)
    padding: Literal["zero", "free"] = "zero"

    def __post_init__(self) -> None:
        require_choice("sampling.kind", self.kind, samplers.KINDS)
        require_choice("sampling.grid", self.grid, samplers.GRIDS)
        require_choice("sampling.padding", self.padding, PADDINGS)
        require_at_least("sampling.steps", self.steps, 1)
        for name in ("eta", "churn", "guidance"):
            require_at_least(f"sampling.{name}", getattr(self, name), 0)

    def evaluations(self, num_times: int) -> int:
        """Network evaluations of one token."""
        if self.kind == "ddpm":
            steps = num_times
        else:
            samplers.check_steps(self.steps, num_times)
            steps = 2 * self.steps - 1 if self.kind == "heun" else self.steps
        return steps * (2 if self.guidance != 1 else 1)


@torch.no_grad()
def sample_tokens(
    model: Generator,
    prototypes_nLP: Tensor,
    seeds: Sequence[int],
    sampler: SamplerConfig | None = None,
    *,
    tokens: range | None = None,
    rows_per_pass: int = 512,
    null_prototypes_nLP: Tensor | None = None,
    valid_L: Tensor | None = None,
    hoist: bool = True,
) -> Tensor:
    """``(n, len(tokens), D)`` float32 tokens of n networks.

    Args:
        model: in eval mode.
        prototypes_nLP: of each network; one row serves all.
        seeds: one per network.
        sampler: None: 50 ancestral steps on the trailing grid.
        tokens: the part of the sequence to draw, beginning at a multiple of 16; None: all.
        rows_per_pass: rows in the denoiser at a time, rounded down to a multiple of 16.
        null_prototypes_nLP: without condition, for ``sampler.guidance``.
        valid_L: values in each token (``TokenCodec.valid_L``), for ``sampler.padding="zero"``; None: all.
        hoist: False computes the projections in every evaluation, as the released code does.

    Raises: ConfigError for steps beyond those trained, or guidance without ``null_prototypes_nLP``.
    """
    sampler = sampler or SamplerConfig()
    tokens = range(model.config.num_tokens) if tokens is None else tokens
    prototypes_nLP = prototypes_nLP.expand(len(seeds), -1, -1)
    if model.config.head == "mse":
        return prototypes_nLP[:, tokens.start : tokens.stop].float()
    sampler.evaluations(model.diffusion.num_steps)
    if sampler.guidance != 1 and null_prototypes_nLP is None:
        raise ConfigError("sampling.guidance needs a conditional generator; use sampling.guidance=1.")
    null = None if sampler.guidance == 1 else null_prototypes_nLP.expand(len(seeds), -1, -1)
    times: dict[int, Tensor] = {}  # embeddings of times, which all passes share
    out_nLD = torch.empty(len(seeds), len(tokens), model.config.dim_per_token)
    for blocks in _passes(len(seeds), tokens, rows_per_pass):
        rows_RP = torch.cat([prototypes_nLP[network, part] for network, part in blocks])
        null_RP = None if null is None else torch.cat([null[network, part] for network, part in blocks])
        noise = RowNoise([(seeds[network], part) for network, part in blocks], out_nLD.shape[2], rows_RP.device)
        predict: samplers.Predict = NoisePrediction(
            model, rows_RP, null_RP, sampler.guidance, times=times if hoist else None
        )
        if valid_L is not None and sampler.padding == "zero":
            valid_R = torch.cat([valid_L[part] for _, part in blocks]).to(rows_RP.device)
            predict = held_at_zero(predict, valid_R, out_nLD.shape[2], model.diffusion.abar_T.tolist())
        last = run_sampler(predict, noise.start(), model, sampler, noise)
        first = 0
        for network, part in blocks:
            count = part.stop - part.start
            at = part.start - tokens.start
            out_nLD[network, at : at + count] = last[first : first + count].float().cpu()
            first += count
    return out_nLD


def run_sampler(
    predict: samplers.Predict, start_RD: Tensor, model: Generator, sampler: SamplerConfig, noise: samplers.Noise
) -> Tensor:
    """The last state of a chain.

    Raises: RuntimeError if it holds NaN.
    """
    states = collections.deque(chain(predict, start_RD, model, sampler, noise), maxlen=1)
    last = states.pop()
    if not bool(torch.isfinite(last).all()):
        raise RuntimeError("the sampler produced values that are not finite; train longer, or sample in float32.")
    return last


def chain(
    predict: samplers.Predict, start_RD: Tensor, model: Generator, sampler: SamplerConfig, noise: samplers.Noise
) -> Iterator[Tensor]:
    """The states of ``sampler`` after each step."""
    tables = model.diffusion.tables
    if sampler.kind == "ddpm":
        return samplers.ddpm(predict, start_RD, tables, noise)
    if sampler.kind == "ddim":
        return samplers.ddim(predict, start_RD, tables, noise, steps=sampler.steps, eta=sampler.eta, grid=sampler.grid)
    if sampler.kind == "trailing":
        return samplers.trailing(predict, start_RD, tables, noise, steps=sampler.steps, eta=sampler.eta)
    if sampler.kind == "dpm_solver_sde":
        return samplers.dpm_solver_sde(predict, start_RD, tables, noise, steps=sampler.steps)
    return samplers.heun(predict, start_RD, tables, noise, steps=sampler.steps, churn=sampler.churn)


class NoisePrediction:
    """The model's noise prediction for fixed rows, called with (x_RD, t).

    Args:
        times: embeddings of times made so far, kept for later calls; None projects prototypes and times in every call.
    """

    def __init__(
        self,
        model: Generator,
        prototypes_RP: Tensor,
        null_RP: Tensor | None,
        guidance: float,
        *,
        times: dict[int, Tensor] | None,
    ) -> None:
        self.model, self.guidance, self.times = model, guidance, times
        self.abar = model.diffusion.abar_T.tolist()
        self.conditions = [prototypes_RP] + ([] if null_RP is None else [null_RP])
        if times is not None:
            self.conditions = [model.denoiser.condi_embedder(rows) for rows in self.conditions]

    def __call__(self, x_RD: Tensor, t: int) -> Tensor:
        outputs = [self._output(x_RD, t, condition) for condition in self.conditions]
        eps = [self.model.diffusion.to_noise(output.float(), x_RD, self.abar[t]) for output in outputs]
        if len(eps) == 1:
            return eps[0]
        return torch.lerp(eps[1], eps[0], self.guidance)

    def _output(self, x_RD: Tensor, t: int, condition: Tensor) -> Tensor:
        denoiser = self.model.denoiser
        if self.times is None:
            return denoiser(x_RD, torch.full((len(x_RD),), t, device=x_RD.device), condition)
        if t not in self.times:
            self.times[t] = denoiser.time_embedder(torch.full((1,), t, device=x_RD.device))
        return denoiser.denoise(x_RD, self.times[t], condition)


def held_at_zero(predict: samplers.Predict, valid_R: Tensor, size: int, abar: Sequence[float]) -> samplers.Predict:
    """The prediction under which padding is clean zero plus noise, as it always was in training.

    No loss ever told the network what to predict there; left to itself it drifts away from what the convolutions of
    the values beside it have learned to see.
    """

    is_value_RD = torch.arange(size, device=valid_R.device) < valid_R[:, None]

    def held(x_RD: Tensor, t: int) -> Tensor:
        return torch.where(is_value_RD, predict(x_RD, t), x_RD / (1 - abar[t]) ** 0.5)

    return held


class RowNoise:
    """Standard normal rows of blocks of tokens, one stream per (network seed, block)."""

    def __init__(self, blocks: Sequence[tuple[int, slice]], size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.counts = [part.stop - part.start for _, part in blocks]
        self.streams = [
            generator(seed, "token noise", part.start // NOISE_BLOCK, device=device) for seed, part in blocks
        ]

    def start(self) -> Tensor:
        """The pure noise that a chain begins with."""
        return self(-1)

    def __call__(self, index: int) -> Tensor:
        """The next rows; the index only says which they are."""
        return torch.cat(
            [
                torch.randn(count, self.size, generator=stream, device=self.device)
                for count, stream in zip(self.counts, self.streams, strict=True)
            ]
        )


def token_shares(num_tokens: int, processes: int) -> list[range]:
    """The tokens of each process: contiguous, as even as blocks of 16 allow."""
    blocks = -(-num_tokens // NOISE_BLOCK)
    edges = [min(num_tokens, blocks * rank // processes * NOISE_BLOCK) for rank in range(processes + 1)]
    return [range(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]


def _passes(networks: int, tokens: range, rows_per_pass: int) -> Iterator[list[tuple[int, slice]]]:
    """(network, tokens) of each pass, whole blocks of at most ``rows_per_pass`` rows."""
    if tokens.start % NOISE_BLOCK:
        raise ConfigError(f"tokens must begin at a multiple of {NOISE_BLOCK}, not {tokens.start}; see token_shares.")
    require_at_least("rows_per_pass", rows_per_pass, 1)
    held: list[tuple[int, slice]] = []
    rows = 0
    for network in range(networks):
        for first in range(tokens.start, tokens.stop, NOISE_BLOCK):
            part = slice(first, min(first + NOISE_BLOCK, tokens.stop))
            count = part.stop - part.start
            if held and rows + count > rows_per_pass:
                yield held
                held, rows = [], 0
            held.append((network, part))
            rows += count
    if held:
        yield held
