"""Options of ``python -m diffullama.train``.

``configs/diffullama/train.yaml`` lists every field below. Steps are optimizer steps, batch sizes are sequences.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from common.config import (
    BatchConfig,
    RunConfig,
    TrainerConfig,
    require_at_least,
    require_choice,
    require_processes,
    share_batch,
)
from common.errors import ConfigError
from diffullama.lora import PeftConfig
from diffullama.losses import LOSS_NORMS

STAGES = ("ddm", "ddm-sft", "pt", "sft")
CAUSAL_STAGES = ("pt", "sft")
TIME_SAMPLERS = ("stratified", "independent")
TEXT_ONLY = ("packed:", "mixed:")  # data that can be no pairs
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flex_attention")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is trained: which tokens are hidden, how the loss is weighted, how attention opens."""

    stage: Literal["ddm", "ddm-sft", "pt", "sft"] = "ddm"  # adapt, finetune; pt and sft: the same autoregressively
    shift: bool = True  # keep the parent's shift: position i is predicted by the hidden state before it
    loss_norm: Literal["tokens", "masked"] = "tokens"  # masked: the reference's scale, about twice the bound
    time_sampler: Literal["stratified", "independent"] = "stratified"  # over the global batch
    time_eps: float = 1e-3  # smallest masking time
    anneal_steps: int = 10_000  # steps until attention is fully open; 1: from the start
    by_id: bool = False  # clean tokens that equal the mask's id count as masked, as in the reference
    keep_first: bool = True  # with shift: position 0, which has no prediction, stays clean; the reference masks it

    def __post_init__(self) -> None:
        require_choice("objective.stage", self.stage, STAGES)
        require_choice("objective.loss_norm", self.loss_norm, LOSS_NORMS)
        require_choice("objective.time_sampler", self.time_sampler, TIME_SAMPLERS)
        require_at_least("objective.anneal_steps", self.anneal_steps, 1)
        if not 0 < self.time_eps < 1:
            raise ConfigError(f"objective.time_eps={self.time_eps} must lie in (0, 1); the reference has 1e-3.")

    @property
    def is_causal(self) -> bool:
        """Whether this is a stage of the autoregressive baseline."""
        return self.stage in CAUSAL_STAGES

    @property
    def is_finetuning(self) -> bool:
        """Whether data are pairs of prompt and answer."""
        return self.stage in ("ddm-sft", "sft")


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Which model is adapted; ``path`` or, from scratch, ``architecture``."""

    path: str | None = None  # hub name, folder in the hub's format, or a run of ours
    from_scratch: bool = False  # random weights of the same architecture
    architecture: dict[str, Any] | None = None  # options of a transformers configuration, model_type among them
    mask_token_id: int | None = None  # existing id that becomes the mask; null: the family's, or the tokenizer's
    add_mask_token: bool = False  # a new token instead
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] | None = None  # null: sdpa
    opened_attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] | None = None  # once fully open
    dropout: float | None = None  # of GPT-2's three kinds; null: the model's own (0.1 for gpt2)
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the parameters; fp32 with autocast unless memory forbids
    length: int = 1024  # tokens per sequence

    def __post_init__(self) -> None:
        require_at_least("model.length", self.length, 2)
        for name in ("attn_implementation", "opened_attention"):
            if getattr(self, name) is not None:
                require_choice(f"model.{name}", getattr(self, name), ATTENTION)
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout={self.dropout} must lie in [0, 1).")
        if not self.path and not self.architecture:
            raise ConfigError("model.path is empty; give a hub name or folder, or a preset such as model=gpt2.")
        if self.architecture and not self.from_scratch:
            raise ConfigError("model.architecture describes a model without weights; add model.from_scratch=true.")
        if self.mask_token_id is not None and self.add_mask_token:
            raise ConfigError(
                f"model.mask_token_id={self.mask_token_id} and model.add_mask_token=true contradict each other; leave "
                "one of them out."
            )


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Text that is packed into blocks, or pairs of prompt and answer."""

    train: str = "embedded"  # embedded, a path or pattern, a hub id, packed:FOLDER, mixed:A=0.7+B=0.3
    valid: str | None = "embedded"  # null: no validation
    tokenizer: str | None = None  # null: the model's own; byte, bpe:<size>, a folder or a hub id
    cache_dir: str = "data"  # downloads and token caches
    num_workers: int = 2  # loader processes per training process; 0: none
    group_size: int | None = None  # documents packed together, dropping each group's tail; 1000 is the reference
    streaming: bool = False  # read and tokenize while training, keep no cache; data.train only
    bos: bool = True  # blocks of text begin with the begin-of-text token, as generated texts do; the reference has none
    valid_size: float = 0.0  # with valid=null: rows of data.train that are held out, a number or (below 1) a share
    prompt_column: str = "instruction"  # of pairs
    answer_column: str = "output"
    separator: str = "\n"  # between prompt and answer, one token; of models whose family has none of its own
    reference_layout: bool = False  # pairs as in the released code, which can lose a long prompt's answer

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError("data.train is empty; name a text (data=embedded needs no download).")
        require_at_least("data.num_workers", self.num_workers, 0)
        require_at_least("data.valid_size", self.valid_size, 0)
        if self.valid_size and self.valid is not None:
            raise ConfigError(
                f"data.valid_size={self.valid_size:g} holds out a part of data.train, but data.valid={self.valid}; set "
                "data.valid=null or data.valid_size=0."
            )
        if self.valid_size > 1 and self.valid_size % 1:
            raise ConfigError(f"data.valid_size={self.valid_size} must be a whole number of rows, or a share below 1.")
        if self.valid_size and self.streaming:
            raise ConfigError("data.valid_size needs a data set with an end; with data.streaming=true name data.valid.")
        if self.group_size is not None:
            require_at_least("data.group_size", self.group_size, 1)
            if self.streaming:
                raise ConfigError(
                    f"data.group_size={self.group_size} does not work with data.streaming=true, which packs one "
                    "stream; leave one of them out."
                )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    batch_size: int = 256  # sequences per optimizer step, over all processes
    accum: int = 1  # forward passes per step and process
    n_iters: int = 10_000  # optimizer steps of the whole run
    epochs: float | None = None  # passes over data.train instead of n_iters
    log_freq: int = 10  # steps between records in metrics.jsonl
    eval_freq: int = 1000  # steps between losses on the held-out text; 0: never
    save_freq: int = 1000  # steps between resumable checkpoints
    snapshot_freq: int = 0  # steps between exported models with sampled texts, kept for ever; 0: at the end only
    ema: float | None = None  # decay of the moving average of the weights; null: none, as in the reference

    def __post_init__(self) -> None:
        for name in ("batch_size", "accum", "n_iters", "log_freq", "save_freq"):
            require_at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("eval_freq", "snapshot_freq"):
            require_at_least(f"training.{name}", getattr(self, name), 0)
        if self.epochs is not None and not self.epochs > 0:
            raise ConfigError(f"training.epochs={self.epochs} must be positive; null: training.n_iters steps.")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ConfigError(f"training.ema={self.ema} must lie in [0, 1); null switches the moving average off.")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    batch_size: int = 64  # held-out sequences per evaluation, a fixed set
    micro_batch_size: int = 8  # of them per forward pass; keys the masks, so curves compare at equal values only

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch_size"):
            require_at_least(f"eval.{name}", getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class SnapshotSampling:
    """Texts that a snapshot shows."""

    texts: int = 4  # 0: none
    steps: int = 64
    temperature: float = 0.9
    top_p: float = 0.9

    def __post_init__(self) -> None:
        require_at_least("sampling.texts", self.texts, 0)
        require_at_least("sampling.steps", self.steps, 1)
        require_at_least("sampling.temperature", self.temperature, 0)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling.top_p={self.top_p} must lie in (0, 1].")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Everything that ``diffullama.train`` reads."""

    name: str = "diffullama"
    run_dir: str = "runs/diffullama"  # one folder per run; the same folder again continues the run
    model: ModelSection
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    data: DataSection = field(default_factory=DataSection)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sampling: SnapshotSampling = field(default_factory=SnapshotSampling)

    def __post_init__(self) -> None:
        super().__post_init__()
        attention = self.model.attn_implementation or "sdpa"
        if not self.objective.is_causal and self.objective.anneal_steps > 1 and attention not in ("sdpa", "eager"):
            raise ConfigError(
                f"model.attn_implementation={attention} takes no annealed mask, but objective.anneal_steps="
                f"{self.objective.anneal_steps}; use sdpa with model.opened_attention={attention}, or "
                "objective.anneal_steps=1."
            )
        backends = (self.model.attn_implementation, self.model.opened_attention)
        if self.precision == "fp32" and any(name and "flash" in name for name in backends):
            raise ConfigError(
                "precision=fp32 does not work with flash attention, whose kernels take half precision only; use "
                "precision=bf16, or sdpa."
            )
        if self.peft.kind != "none" and self.peft.train_mask_row and self.objective.is_causal:
            raise ConfigError(
                f"peft.train_mask_row=true, but objective.stage={self.objective.stage} has no mask; set it to false."
            )
        for option in ("train", "valid"):
            name = getattr(self.data, option) or ""
            if self.objective.is_finetuning and name.startswith(TEXT_ONLY):
                raise ConfigError(
                    f"data.{option}={name} holds running text, but objective.stage={self.objective.stage} needs pairs; "
                    "give a file of them (data=pairs), or objective=ddm or pt."
                )
        if self.data.streaming and self.training.epochs is not None:
            raise ConfigError("training.epochs needs a data set with an end; with data.streaming=true use n_iters.")
        if self.model.dtype == "bf16" and self.parallel.plan not in ("none", "ddp"):
            raise ConfigError(
                f"model.dtype=bf16 does not work with parallel.plan={self.parallel.plan}, which keeps one type of "
                "parameters; use model.dtype=fp32 (sharded it needs little more, and sums are exact)."
            )
        if self.data.streaming and self.objective.is_finetuning:
            raise ConfigError("data.streaming=true reads running text; pairs of objective.stage=*-sft are read whole.")

    def micro_size(self, world_size: int) -> int:
        """Sequences per process and forward pass.

        Raises: ConfigError if ``training.batch_size`` cannot be shared out evenly, with the nearest sizes that can.
        """
        return share_batch(self.training.batch_size, self.training.accum, world_size)

    def trainer_config(self, world_size: int) -> TrainerConfig:
        """What the engine needs of this.

        Raises: ConfigError if the batch or ``ngpus`` does not fit the number of processes.
        """
        require_processes(self.ngpus, world_size, "diffullama")
        training = self.training
        return self.engine_config(
            total_steps=training.n_iters,
            batch=BatchConfig(global_size=training.batch_size, micro_size=self.micro_size(world_size)),
            save_steps=training.save_freq,
            ema_decay=training.ema,
            log_interval_steps=training.log_freq,
            validate_interval_steps=training.eval_freq,
        )
