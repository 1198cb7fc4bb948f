"""Options of ``python -m radd.train``; names and defaults follow the reference's configuration where it has them.

``configs/radd/train.yaml`` lists every field below. Steps are optimizer steps, batch sizes are sequences.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from common.config import (
    BatchConfig,
    RunConfig,
    TrainerConfig,
    require_at_least,
    require_choice,
    require_processes,
    share_batch,
)
from common.diffusion.categorical import TokenDraw
from common.diffusion.schedules import build_schedule
from common.errors import ConfigError
from radd.losses import LossConfig
from radd.model import ModelConfig

PREDICTORS = ("euler", "tweedie", "ordered", "first_hitting")
PRECISION_OF_DTYPE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    batch_size: int = 512  # sequences per optimizer step, over all processes
    accum: int = 1  # forward passes per step and process; more of them need less memory
    n_iters: int = 1_000_000  # optimizer steps of the whole run
    snapshot_freq: int = 50_000  # steps between exported snapshots, kept for ever; 0: none
    log_freq: int = 50  # steps between records in metrics.jsonl
    eval_freq: int = 100  # steps between losses on the held-out set; 0: never
    snapshot_freq_for_preemption: int = 10_000  # steps between resumable checkpoints
    weight: Literal["standard"] = "standard"  # unused by the reference too; kept so that its files round-trip
    snapshot_sampling: bool = True  # texts with every snapshot
    save_reference_pth: bool = False  # snapshots also as checkpoints/checkpoint_{step}.pth of the reference
    ema: float | None = 0.9999  # decay of the moving average of the weights; null: none
    loss_type: Literal["t_DSE", "t_DCE", "lambda_DCE", "k_DCE"] = "t_DCE"
    loss_norm: Literal["tokens", "sequences"] = "tokens"  # sequences: the reference's scale, which clipping sees
    time_sampler: Literal["naive", "vdm", "decoupled", "stratified"] | None = None  # null: the reference's for the loss
    sampling_eps: float = 1e-3  # t losses: smallest time drawn
    antithetic: bool = False  # masking levels in pairs v, 1 - v
    exact_range: bool = False  # t losses: also cover the masking levels that the reference leaves out
    decay_exclude_norms: bool = False  # no weight decay on norms, biases and embeddings; the reference decays all

    def __post_init__(self) -> None:
        for name in ("batch_size", "accum", "n_iters", "log_freq", "snapshot_freq_for_preemption"):
            require_at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("snapshot_freq", "eval_freq"):
            require_at_least(f"training.{name}", getattr(self, name), 0)
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ConfigError(f"training.ema={self.ema} must lie in [0, 1); null switches the moving average off.")
        LossConfig.from_section(self)  # its checks


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Both splits are packed into blocks of ``model.length`` tokens."""

    train: str = "openwebtext"  # embedded, a known corpus, a hub id, a path, or name=path/*.txt|jsonl|parquet
    valid: str = "wikitext103"
    cache_dir: str = "data"  # downloads and token caches
    tokenizer: str = "gpt2"  # byte, bpe:<vocabulary size>, a local folder or a hub id
    num_workers: int = 2  # loader processes per training process; 0: none
    group_size: int | None = None  # documents packed together, dropping each group's tail; 1000 is the reference
    detokenizer: str = "auto"  # auto by the corpus, none, wikitext, ptb, lm1b or lambada
    text_unit: Literal["file", "paragraph", "line", "full_line"] | None = None  # a document of a text file
    streaming: bool = False  # read and tokenize while training, keep no cache; data.train only

    def __post_init__(self) -> None:
        for name in ("train", "valid", "tokenizer"):
            if not getattr(self, name):
                raise ConfigError(
                    f"data.{name} is empty; name one (data=embedded sets all three and needs no download)."
                )
        require_at_least("data.num_workers", self.num_workers, 0)
        if self.group_size is not None:
            require_at_least("data.group_size", self.group_size, 1)
            if self.streaming:
                raise ConfigError(
                    f"data.group_size={self.group_size} does not work with data.streaming=true, which packs one "
                    "stream; leave one of them out."
                )


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    type: Literal["loglinear", "geometric"] = "loglinear"
    sigma_min: float = 1e-4  # geometric only: total noise at time 0, in nats
    sigma_max: float = 20.0  # geometric only: total noise at time 1, in nats

    def __post_init__(self) -> None:
        build_schedule(self.type, self.sigma_min, self.sigma_max)  # its checks


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the texts of a snapshot are drawn."""

    predictor: Literal["euler", "tweedie", "ordered", "first_hitting"] = "euler"
    steps: int = 1024  # of euler and tweedie; the others reveal one token per call
    batch_size: int | None = None  # texts per process and snapshot; null: as many as one forward pass trains on
    strategy: Literal["direct", "top_p", "top_k", "min_p", "greedy"] = "direct"
    strategy_para: float | None = None  # top_p, min_p: probability; top_k: number of tokens
    precision: Literal["float64", "float32"] = "float64"  # of the categorical draws

    def __post_init__(self) -> None:
        require_choice("sampling.predictor", self.predictor, PREDICTORS)
        require_at_least("sampling.steps", self.steps, 1)
        if self.batch_size is not None:
            require_at_least("sampling.batch_size", self.batch_size, 1)
        self.token_draw(None)

    def token_draw(self, tokens: int | None) -> TokenDraw:
        """The rule by which a token is drawn; with ``tokens``, top_k is compared with the vocabulary too."""
        try:
            draw = TokenDraw(strategy=self.strategy, para=self.strategy_para, precision=self.precision)
            if tokens is not None:
                draw.check_vocabulary(tokens)
        except ConfigError as error:
            raise ConfigError(f"sampling.{error}") from None
        return draw


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    batch_size: int = 512  # held-out sequences per evaluation: a fixed set, where the reference draws one random batch
    micro_batch_size: int = 16  # of them per forward pass; keys the masks, so curves compare at equal values only
    perplexity: bool = True  # score the texts of a snapshot with gpt_dir
    perplexity_batch_size: int = 16  # texts per forward pass of the scorer; a smaller rest is scored too

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch_size", "perplexity_batch_size"):
            require_at_least(f"eval.{name}", getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Everything that ``radd.train`` reads."""

    name: str = "radd"
    run_dir: str = "runs/radd"  # one folder per run; the same folder again continues the run
    tokens: int = 50257  # real tokens N; the mask is id N
    gpt_dir: str = "gpt2-large"  # scorer of sampled texts: hub id or local folder
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    model: ModelConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("tokens", self.tokens, 1)
        self.sampling.token_draw(self.tokens)
        self.autocast_precision()

    def autocast_precision(self) -> str:
        """The number format of the forward pass: ``model.dtype`` in the engine's words, else ``precision``.

        Raises: ConfigError if both are given and differ.
        """
        if self.model.dtype is None:
            return self.precision
        asked = PRECISION_OF_DTYPE[self.model.dtype]
        if self.precision not in ("auto", asked):
            raise ConfigError(
                f"model.dtype={self.model.dtype} and precision={self.precision} contradict each other; leave "
                "one of them out (model.dtype=null or precision=auto)."
            )
        return asked

    def micro_size(self, world_size: int) -> int:
        """Sequences per process and forward pass.

        Raises: ConfigError if ``training.batch_size`` cannot be shared out evenly, with the nearest sizes that can.
        """
        return share_batch(self.training.batch_size, self.training.accum, world_size)

    def trainer_config(self, world_size: int) -> TrainerConfig:
        """What the engine needs of this.

        Raises: ConfigError if the batch or ``ngpus`` does not fit the number of processes.
        """
        require_processes(self.ngpus, world_size, "radd")
        training, parallel = self.training, self.parallel
        if self.model.use_checkpoint:
            parallel = replace(parallel, activation_checkpointing=False)  # the model recomputes its blocks itself
        return self.engine_config(
            total_steps=training.n_iters,
            batch=BatchConfig(global_size=training.batch_size, micro_size=self.micro_size(world_size)),
            parallel=parallel,
            save_steps=training.snapshot_freq_for_preemption,
            precision=self.autocast_precision(),
            ema_decay=training.ema,
            log_interval_steps=training.log_freq,
            validate_interval_steps=training.eval_freq,
        )
