"""Options of ``python -m logah.finetune``. Steps are optimizer steps; batch sizes are over all processes."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from common.config import (
    EPOCH_SCHEDULES,
    BatchConfig,
    OptimConfig,
    RunConfig,
    TrainerConfig,
    require_at_least,
    require_choice,
    require_processes,
    share_batch,
)
from common.errors import ConfigError
from logah.data_config import DataSection
from logah.mixing import require_mix
from logah.starts import Start, StartOptions, parse_starts

SPLITS = ("validation", "test")


@dataclass(frozen=True, kw_only=True)
class FinetuneTraining:
    """Options ``training.*``."""

    epochs: int = 100
    steps: int | None = None  # optimizer steps, instead of epochs
    accum: int = 1  # forward passes per step and process; more of them need less memory
    evaluate_steps: int | None = None  # steps between evaluations; null: after every epoch
    evaluate_on: Literal["validation", "test"] = "validation"  # what curves show and learning rates are chosen on
    final_test: bool = True  # score the trained network on the test data as well
    loss: Literal["ce", "bce"] = "ce"  # images: cross-entropy, or a yes or no per class
    label_smoothing: float = 0.0  # images: share of the target spread over all classes
    mixup: float = 0.0  # images: alpha of the mixing share's Beta law; 0: off
    cutmix: float = 0.0  # images: the same of CutMix; 0: off
    mix_probability: float = 1.0  # share of the steps that mix
    mix_switch: float = 0.5  # where both are on: share of CutMix
    decay: Literal["all", "matrices"] = "all"  # parameters that weight decay shrinks
    log_freq: int = 50  # steps between records in metrics.jsonl
    save_freq: int | None = None  # steps between resumable checkpoints; null: as evaluations
    ema: float | None = None  # decay of a moving average of the weights, which is evaluated instead; null: none
    export: bool = True  # write each trained network to its run's export/

    def __post_init__(self) -> None:
        for name in ("epochs", "accum", "log_freq"):
            require_at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("steps", "evaluate_steps", "save_freq"):
            if getattr(self, name) is not None:
                require_at_least(f"training.{name}", getattr(self, name), 1)
        require_choice("training.evaluate_on", self.evaluate_on, SPLITS)
        require_choice("training.loss", self.loss, ("ce", "bce"))
        require_choice("training.decay", self.decay, ("all", "matrices"))
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"training.label_smoothing={self.label_smoothing} must lie in [0, 1).")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ConfigError(f"training.ema={self.ema} must lie in [0, 1); null switches the moving average off.")
        require_mix(self.mixup, self.cutmix, self.mix_probability, self.mix_switch)

    @property
    def mixes(self) -> bool:
        return bool(self.mixup or self.cutmix) and self.mix_probability > 0


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """Everything that ``logah.finetune`` reads."""

    name: str = "finetune"
    run_dir: str = "runs/finetune"  # results, and a folder per run; the same command again continues
    target: str | dict[str, Any]  # the network, see logah/targets.py
    inits: list[str] = field(default_factory=lambda: ["random"])  # what to start from, see logah/starts.py
    seeds: list[int] | None = None  # one run each, per start and learning rate; null: seed
    lrs: list[float] | None = None  # peak learning rates to try; null: optim.lr
    match_data: bool = True  # give the network the data's classes, or their vocabulary if its own is smaller
    start: StartOptions = field(default_factory=StartOptions)
    data: DataSection = field(default_factory=DataSection)
    training: FinetuneTraining = field(default_factory=FinetuneTraining)

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_starts(self.inits)
        for name, values in (("seeds", self.seeds), ("lrs", self.lrs)):
            if values is not None and (not values or len(set(values)) != len(values)):
                raise ConfigError(f"{name}={values} must be a list of different numbers, or null.")
        for rate in self.lrs or []:
            OptimConfig(lr=rate)  # its checks
        if self.data.kind == "lm":
            for name, off in (("mixup", 0.0), ("cutmix", 0.0), ("label_smoothing", 0.0), ("loss", "ce")):
                if getattr(self.training, name) != off:
                    raise ConfigError(
                        f"training.{name}={getattr(self.training, name)} is for images; leave it out for data.kind=lm."
                    )

    @property
    def starts(self) -> tuple[Start, ...]:
        return parse_starts(self.inits)

    def engine(
        self, run_dir: str, *, seed: int, optim: OptimConfig, steps_per_epoch: int, world_size: int
    ) -> TrainerConfig:
        """What the engine needs for one of the runs.

        Raises: ConfigError if the batch or ``ngpus`` does not fit the number of processes.
        """
        require_processes(self.ngpus, world_size, "logah")
        training, batch_size = self.training, self.data.batch_size
        try:
            micro_size = share_batch(batch_size, training.accum, world_size)
        except ConfigError as error:
            raise ConfigError(str(error).replace("training.batch_size", "data.batch_size")) from None
        interval = training.evaluate_steps or steps_per_epoch
        if optim.schedule in EPOCH_SCHEDULES and not optim.epoch_steps:
            optim = replace(optim, epoch_steps=steps_per_epoch)
        return self.engine_config(
            run_dir=run_dir,
            seed=seed,
            optim=optim,
            total_steps=training.steps or training.epochs * steps_per_epoch,
            batch=BatchConfig(global_size=batch_size, micro_size=micro_size),
            save_steps=training.save_freq or interval,
            ema_decay=training.ema,
            log_interval_steps=training.log_freq,
            validate_interval_steps=interval,
        )
