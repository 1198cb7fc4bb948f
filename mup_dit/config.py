"""Options of ``python -m mup_dit.train``. Steps are optimizer steps, batch sizes are images over all processes."""

from dataclasses import dataclass, field, replace
from functools import cached_property
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
from mup_dit.building import ModelConfig, read_model_config
from mup_dit.data import DataSection
from mup_dit.objective import ObjectiveConfig
from mup_dit.optimizer_groups import DECAY_RULES

REFERENCE_BATCH = 256  # of which optim.auto_lr takes the square-root rule


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    batch_size: int = 256  # images per optimizer step, over all processes
    accum: int = 1  # forward passes per step and process
    n_iters: int = 400_000  # optimizer steps of the whole run
    epochs: float | None = None  # passes over data.train instead of n_iters
    log_freq: int = 100  # steps between records in metrics.jsonl
    eval_freq: int = 0  # steps between losses on the held-out images; 0: never
    save_freq: int = 50_000  # steps between resumable checkpoints
    snapshot_freq: int = 0  # steps between exported models with a grid of samples, kept for ever; 0: at the end only
    ema: float | None = 0.9999  # decay of the moving average of the weights; null: none
    ema_warmup: bool = True  # the decay rises with the number of updates; false: the reference

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
class MupConfig:
    """What muP adds to the options of the optimizer."""

    loglr: float | None = None  # base learning rate 2^loglr instead of optim.lr; null: optim.lr
    decay_rule: Literal["scaled", "independent"] = "scaled"  # scaled: decay times m for matrices, as the mup package
    scale_eps: bool = False  # Adam's eps divided by m for matrices
    auto_lr: bool = False  # standard parametrisation: rate times sqrt(batch / 256), as PixArt-alpha

    def __post_init__(self) -> None:
        require_choice("mup.decay_rule", self.decay_rule, DECAY_RULES)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    batch_size: int = 256  # held-out images per evaluation, a fixed set
    micro_batch_size: int = 64  # of them per forward pass; keys times and noise, so curves compare at equal values only

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch_size"):
            require_at_least(f"eval.{name}", getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class SnapshotSampling:
    """The grid that a snapshot shows."""

    images: int = 16  # 0: none
    steps: int = 25
    cfg_scale: float = 1.0

    def __post_init__(self) -> None:
        require_at_least("sampling.images", self.images, 0)
        require_at_least("sampling.steps", self.steps, 1)
        require_at_least("sampling.cfg_scale", self.cfg_scale, 1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Everything that ``mup_dit.train`` reads."""

    name: str = "mup_dit"
    run_dir: str = "runs/mup_dit"  # one folder per run; the same folder again continues the run
    save_base_shapes: str | None = None  # write the base-shape file (.bsh) of this model and stop
    init_from: str | None = None  # start from the weights of a model folder, run or released checkpoint
    model: dict[str, Any]
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataSection = field(default_factory=DataSection)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    mup: MupConfig = field(default_factory=MupConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sampling: SnapshotSampling = field(default_factory=SnapshotSampling)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mup.auto_lr and self.network.parametrization == "mup":
            raise ConfigError(
                "mup.auto_lr=true scales the rate with the batch for the standard parametrisation; by muP tune the "
                "rate at the batch size that you train with, and set mup.auto_lr=false."
            )

    @cached_property
    def network(self) -> ModelConfig:
        """Network and parametrisation."""
        return read_model_config(self.model)

    @property
    def learning_rate(self) -> float:
        """The base rate: ``2^mup.loglr``, or ``optim.lr``, by ``mup.auto_lr`` times sqrt(batch / 256)."""
        rate = self.optim.lr if self.mup.loglr is None else 2.0**self.mup.loglr
        return rate * (self.training.batch_size / REFERENCE_BATCH) ** 0.5 if self.mup.auto_lr else rate

    def trainer_config(self, world_size: int) -> TrainerConfig:
        """What the engine needs of this.

        Raises: ConfigError if the batch or ``ngpus`` does not fit the number of processes.
        """
        require_processes(self.ngpus, world_size, "mup_dit")
        training = self.training
        micro_size = share_batch(training.batch_size, training.accum, world_size)
        return self.engine_config(
            total_steps=training.n_iters,
            batch=BatchConfig(global_size=training.batch_size, micro_size=micro_size),
            optim=replace(self.optim, lr=self.learning_rate),
            save_steps=training.save_freq,
            ema_decay=training.ema,
            ema_warmup=training.ema_warmup,
            log_interval_steps=training.log_freq,
            validate_interval_steps=training.eval_freq,
        )
