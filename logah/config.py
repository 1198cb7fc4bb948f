"""Options of ``python -m logah.train``. Steps are optimizer steps; batches are over all processes."""

from dataclasses import dataclass, field, fields, replace
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
from common.conversion import unknown_option
from common.errors import ConfigError
from logah.architecture_config import NetsSection
from logah.data_config import DataSection
from logah.model_config import HyperNetworkConfig
from logah.objective import NORM_PENALTY

SCHEMES = ("fast", "reference")
DATA_DECIDES = ("num_classes", "variant")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    epochs: int = 300  # passes over the training data
    steps: int | None = None  # optimizer steps of the whole run instead; null: epochs
    accum: int = 1  # forward passes per step and process, each with its share of the meta-batch
    norm_penalty: float = NORM_PENALTY  # weight of the sum of the norms of all predicted parameters
    label_smoothing: float = 0.0  # vision; 0.1 on ImageNet
    # fast: networks without values, graphs and targets kept, only what is needed decoded; reference: as released
    scheme: Literal["fast", "reference"] = "fast"
    log_freq: int = 100  # steps between records in metrics.jsonl
    save_freq: int = 300  # steps between resumable checkpoints
    interm_epoch: int = 5  # epochs between exported hypernetworks (and after the first), kept for ever; 0: never
    valid_epoch: int = 1  # epochs between tests of networks that are never trained on; 0: never
    valid_nets: int = 4  # so many of them, drawn as the training networks are
    ema: bool = False  # average the weights; tests and exports then use the average
    ema_rate: float = 0.999

    def __post_init__(self) -> None:
        require_choice("training.scheme", self.scheme, SCHEMES)
        for name in ("epochs", "accum", "log_freq", "save_freq", "valid_nets"):
            require_at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("norm_penalty", "label_smoothing", "interm_epoch", "valid_epoch"):
            require_at_least(f"training.{name}", getattr(self, name), 0)
        if self.steps is not None:
            require_at_least("training.steps", self.steps, 1)
        if not 0 <= self.ema_rate < 1:
            raise ConfigError(f"training.ema_rate={self.ema_rate} must lie in [0, 1); 0.999 is usual.")
        if self.label_smoothing >= 1:
            raise ConfigError(f"training.label_smoothing={self.label_smoothing} must be below 1; 0.1 is usual.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Everything that ``logah.train`` reads."""

    name: str = "logah"
    run_dir: str = "runs/logah"
    init_from: str | None = None  # start from the weights of a hypernetwork: a folder, a run or a released file
    model: dict[str, Any] = field(default_factory=dict)  # options of logah/model_config.py
    data: DataSection = field(default_factory=DataSection)
    nets: NetsSection = field(default_factory=NetsSection)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.model_config(num_classes=10)
        family = None if self.nets.set is not None else self.nets.drawn_family
        if family is not None and (family == "vit") != (self.data.kind == "vision"):
            fits = "law=vits1k" if self.data.kind == "vision" else "law=gpts1k or llama1k"
            raise ConfigError(
                f"nets.law={self.nets.law} draws networks of family {family}, but data.kind={self.data.kind}; choose "
                f"nets.{fits}, or other data."
            )
        if self.parallel.plan == "zero3":
            raise ConfigError(
                "parallel=zero3 gathers the weights of a module when it is called, but the decoder reads slices of "
                "them; use parallel=fsdp2, zero2 or ddp."
            )
        if self.training.label_smoothing and self.data.kind != "vision":
            raise ConfigError("training.label_smoothing is for data.kind=vision; set it to 0.")

    def model_config(self, *, num_classes: int) -> HyperNetworkConfig:
        """The hypernetwork for data of so many classes.

        Raises: ConfigError for an unknown option, one that the data decide, or values that do not fit together.
        """
        names = [one.name for one in fields(HyperNetworkConfig)]
        for name in self.model:
            if name not in names:
                raise ConfigError(unknown_option(f"model.{name}", [f"model.{one}" for one in names]))
            if name in DATA_DECIDES and self.model[name] is not None:
                raise ConfigError(f"model.{name} follows from the data; remove it and see data.*.")
        given = {name: value for name, value in self.model.items() if name not in DATA_DECIDES}
        variant = "vision" if self.data.kind == "vision" else "llm"
        return HyperNetworkConfig(variant=variant, num_classes=num_classes, **given)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the run."""
        return self.training.steps or self.training.epochs * steps_per_epoch

    def trainer_config(self, world_size: int, steps_per_epoch: int) -> TrainerConfig:
        """What the engine needs of this.

        Raises: ConfigError if the meta-batch or ``ngpus`` does not fit the number of processes.
        """
        require_processes(self.ngpus, world_size, "logah")
        training, networks = self.training, self.nets.meta_batch
        try:
            micro_size = share_batch(networks, training.accum, world_size)
        except ConfigError as error:
            raise ConfigError(str(error).replace("training.batch_size", "nets.meta_batch")) from None
        optim = self.optim if self.optim.epoch_steps else replace(self.optim, epoch_steps=steps_per_epoch)
        return self.engine_config(
            total_steps=self.total_steps(steps_per_epoch),
            batch=BatchConfig(global_size=networks, micro_size=micro_size),
            save_steps=training.save_freq,
            optim=optim,
            ema_decay=training.ema_rate if training.ema else None,
            ema_warmup=False,
            log_interval_steps=training.log_freq,
        )
