"""Sampling texts from a RADD model: options, what is given, which sampler, and the rows of each process.

Dimensions: L positions.
"""

import hashlib
import json
import logging
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.config import PRECISIONS as MODEL_PRECISIONS
from common.config import require_at_least, require_choice
from common.diffusion.absorbing import FinishedRow
from common.diffusion.categorical import PRECISIONS, STRATEGIES, TokenDraw
from common.diffusion.nfe import DEFAULT_EPS, METHODS, require_steps
from common.diffusion.orders import ORDERS, SELECTION_ORDERS, SelectionRule, check_order
from common.diffusion.samplers import (
    DiffusionSampler,
    FirstHittingSampler,
    OrderedSampler,
    Sampler,
    SelectionSampler,
)
from common.diffusion.schedules import Schedule
from common.errors import ConfigError
from common.generation.denoising_view import DenoisingView
from common.generation.given import read_fixed, read_json, to_ids
from common.generation.run import Generation, write_rows
from common.generation.sample_file import SampleFile, SampleRecord
from common.parallel import Parallel
from common.precision import autocast_forward, resolve_precision
from common.provenance import git_revision
from radd.loading import LoadedModel, load_model
from radd.sampler import network

GENERATION_METHODS = (*METHODS, "ordered", "first_hitting", "parallel")
EXECUTIONS = ("event", "stepwise")
COST_ONLY = {"batch_size", "num_samples", "output", "overwrite", "resume", "show", "device", "progress"}
"""Options that do not decide a row's tokens."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Options of ``python -m radd.generate``; names of the reference's scripts where those have one."""

    model_path: str  # run folder, exported folder, the reference's .pth, or hub name
    ema: bool = True  # averaged weights, where the model has both
    tokenizer: str | None = None  # byte, a folder or a hub name; null: the one the model was trained with
    device: str | None = None  # null: this process's GPU, else the CPU
    model_precision: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"  # of the network; below fp32 the batch can matter

    batch_size: int = 8  # rows in flight per process
    num_samples: int | None = None  # texts in all; null: batch_size
    length: int | None = None  # tokens per text; null: the model's training length
    seed: int = 0

    method: Literal["tweedie", "euler", "ordered", "first_hitting", "parallel"] = "tweedie"
    steps: int = 1024  # tweedie, euler: time grid; parallel: calls, unless another limit is given
    eps: float = DEFAULT_EPS  # tweedie, euler: time at which the grid ends
    sampler: Literal["event", "stepwise"] = "event"  # tweedie, euler: only the steps that reveal something, or all
    block_length: int | None = None  # tweedie, euler, parallel: fill blocks of so many tokens from left to right
    order: Any = "random"  # ordered: random|random_shared|forward|backward, a list, one list per row, or a .json file
    selection: Literal["random", "left_to_right", "confidence", "margin", "entropy"] = (
        "confidence"  # parallel: who first
    )
    per_call: int | None = None  # parallel: positions per call
    threshold: float | None = None  # parallel: all positions whose token has more than this probability
    entropy_bound: float | None = None  # parallel: nats by which positions filled together may depend on each other
    selection_noise: float = 0.0  # parallel: scale of Gumbel noise on the scores

    strategy: Literal["direct", "top_p", "top_k", "min_p", "greedy"] = "direct"
    strategy_para: float | None = None  # top_p, min_p: probability in (0, 1]; top_k: number of tokens
    temperature: float = 1.0  # below one: likelier tokens; 0: greedy
    precision: Literal["float64", "float32", "float16-compat"] = "float64"  # of the draws; see sampler=stepwise

    prefix: str | list[int] = ""  # text or ids at the beginning
    suffix: str | list[int] = ""  # text or ids at the end
    fixed: Any = None  # {position: text or id or ids}, as JSON text, a .json file or a mapping

    output: str | None = None  # .jsonl file; null: texts on stdout only
    overwrite: bool = False  # replace an existing output
    resume: bool = False  # keep the rows that an existing output has
    show: bool = False  # watch a row being denoised in the terminal
    progress: bool = True  # progress bar of the main process, on stderr

    def __post_init__(self) -> None:
        if not self.model_path:
            raise ConfigError("model_path is empty; give a run folder, an exported folder, a .pth file or a hub name.")
        require_choice("method", self.method, GENERATION_METHODS)
        require_choice("sampler", self.sampler, EXECUTIONS)
        require_choice("selection", self.selection, SELECTION_ORDERS)
        require_choice("strategy", self.strategy, STRATEGIES)
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("model_precision", self.model_precision, MODEL_PRECISIONS)
        require_at_least("batch_size", self.batch_size, 1)
        require_steps(self.steps)
        for name in ("num_samples", "length", "block_length", "per_call"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        if self.overwrite and self.resume:
            raise ConfigError("overwrite=true and resume=true contradict each other; set one of them.")
        self.draw()
        if self.precision == "float16-compat" and (self.sampler != "stepwise" or self.method not in METHODS):
            raise ConfigError(
                "precision=float16-compat repeats the reference's one-stage draw; it needs sampler=stepwise and "
                "method=tweedie or euler. Use precision=float64 or float32."
            )
        if self.method == "parallel":
            self.selection_rule()
        if isinstance(self.order, str) and not self.order.endswith(".json") and not self.order.startswith("["):
            require_choice("order", self.order, ORDERS)

    @property
    def samples(self) -> int:
        """Texts in all."""
        return self.num_samples or self.batch_size

    def draw(self) -> TokenDraw:
        """How tokens are drawn."""
        return TokenDraw(
            strategy=self.strategy, para=self.strategy_para, temperature=self.temperature, precision=self.precision
        )

    def selection_rule(self) -> SelectionRule:
        """How method=parallel chooses positions; ``steps`` is the limit unless another one is given."""
        limits = {"per_call": self.per_call, "threshold": self.threshold, "entropy_bound": self.entropy_bound}
        if all(limit is None for limit in limits.values()):
            limits["steps"] = self.steps
        return SelectionRule(order=self.selection, noise=self.selection_noise, **limits)

    def settings(self) -> str:
        """Digest of everything that decides the tokens of a row."""
        decisive = {name: value for name, value in asdict(self).items() if name not in COST_ONLY}
        text = json.dumps(decisive, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def generate(config: GenerateConfig, parallel: Parallel | None = None) -> Generation:
    """Samples the texts that ``config`` asks for; with several processes each takes every W-th row.

    The tokens of row i depend on the options, the seed and i, not on the batch size or the number of processes.

    Raises: ConfigError, DataError or CheckpointError for anything the user can repair, before the first network call.
    """
    parallel = parallel or Parallel(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    device = torch.device(config.device) if config.device else parallel.device
    file = SampleFile(config.output, parallel.rank)
    present = parallel.from_main(
        file.prepare(config.settings(), overwrite=config.overwrite, resume=config.resume) if parallel.is_main else None
    )
    loaded = load_model(config.model_path, device=device, ema=config.ema)
    if config.tokenizer is not None:
        loaded = replace(loaded, tokenizer_source=config.tokenizer)
        loaded.load_tokenizer()  # asked for by name, so its absence is an error
    model = loaded.model.eval()
    autocast_forward(model, resolve_precision(config.model_precision, device), device)
    sampler = build_sampler(config, model, loaded.schedule)
    tokens_L = build_request(config, sampler, loaded)
    free_L = tokens_L == sampler.mask_id
    mine = [row for row in range(config.samples)[parallel.rank :: parallel.world_size] if row not in present]

    def to_record(row: FinishedRow) -> SampleRecord:
        tokens = row.tokens_L.tolist()
        return SampleRecord(
            index=row.index,
            tokens=tokens,
            text=None if loaded.tokenizer is None else loaded.tokenizer.decode(tokens),
            method=config.method,
            steps=config.steps if config.method in METHODS or uses_steps(config) else None,
            free=int(free_L.sum()),
            calls=row.calls,
            launches=row.launches,
            seconds=round(row.seconds, 6),
            seed=config.seed,
            settings=config.settings(),
            git_revision=git_revision(),
        )

    show = config.show and parallel.is_main
    with DenoisingView(loaded.tokenizer, sampler.mask_id) if show else nullcontext() as view:
        finished = sampler.stream(tokens_L, mine, seed=config.seed, max_rows=config.batch_size, on_launch=view)
        return write_rows(
            finished,
            to_record,
            file,
            parallel,
            total=len(mine),
            expected=sampler.expected_calls(free_L),
            progress=config.progress and not config.show,
        )


def uses_steps(config: GenerateConfig) -> bool:
    """Whether method=parallel takes its number of calls from ``steps``."""
    return config.method == "parallel" and config.selection_rule().steps is not None


def build_sampler(config: GenerateConfig, model: nn.Module, schedule: Schedule) -> Sampler:
    """The sampler that ``config`` describes."""
    options = {"draw": config.draw()}
    if config.method == "first_hitting":
        return FirstHittingSampler(network(model), **options)
    if config.method == "ordered":
        return OrderedSampler(network(model), read_order(config.order), **options)
    if config.method == "parallel":
        return SelectionSampler(network(model), config.selection_rule(), block_length=config.block_length, **options)
    return DiffusionSampler(
        network(model),
        schedule,
        method=config.method,
        steps=config.steps,
        eps=config.eps,
        block_length=config.block_length,
        event_driven=config.sampler == "event",
        **options,
    )


def build_request(config: GenerateConfig, sampler: Sampler, loaded: LoadedModel) -> Tensor:
    """tokens_L: the given tokens, and the mask where the model is to write.

    Raises: ConfigError for what does not fit the length or the vocabulary, or an order that is no permutation of it.
    """
    length = config.length or int(loaded.config["model"].get("length", 1024))
    encode = {"tokenizer": loaded.tokenizer}
    tokens_L = sampler.canvas(
        1,
        length,
        prefix=to_ids("prefix", config.prefix, **encode),
        suffix=to_ids("suffix", config.suffix, **encode),
        fixed=read_fixed(config.fixed, **encode),
    )[0]
    if isinstance(sampler, OrderedSampler) and not isinstance(sampler.order, str):
        order = check_order(sampler.order, length)
        if order.dim() == 2 and len(order) < config.samples:
            raise ConfigError(
                f"order has {len(order)} rows for num_samples={config.samples}; give one order for all texts, or one "
                "per text."
            )
    return tokens_L


def read_order(value: Any) -> str | list:
    """An order's name, or its list(s) of positions."""
    if isinstance(value, str) and value not in ORDERS:
        return read_json("order", value)
    return value
