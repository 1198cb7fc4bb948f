"""Typed configuration that every run has: Hydra composes (``common/cli.py``), these frozen dataclasses check.

A paper's own ``config.py`` holds one dataclass per entry point, built from these parts; below the entry point nobody
sees a ``DictConfig``. All step counts are optimizer steps.
"""

import math
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from common.errors import ConfigError

PLANS = ("none", "ddp", "fsdp2", "zero1", "zero2", "zero3")
WHOLE_PARAMETER_PLANS = ("none", "ddp")  # every process holds all parameters and their optimizer state
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
EPOCH_SCHEDULES = ("cosine_epochs", "multistep_epochs", "exponential_epochs")  # the rate changes between epochs only
SCHEDULES = ("constant", "cosine", "wsd", "cosine_constant", "cosine_lagged", *EPOCH_SCHEDULES)
OPTIMIZERS = ("AdamW", "Adam", "AdamW8bit", "LAMB")


def require_choice(name: str, value: object, choices: tuple) -> None:
    """Raises ConfigError unless ``value`` is one of ``choices``; ``name`` is the option as the user types it."""
    if value not in choices:
        spelled = {str(choice).lower(): str(choice) for choice in choices}
        near = get_close_matches(str(value).lower(), spelled, n=1, cutoff=0.5)
        hint = f" Did you mean {spelled[near[0]]!r}?" if near else ""
        raise ConfigError(f"{name}={value!r} is not known; choose one of {', '.join(map(str, choices))}.{hint}")


def require_at_least(name: str, value: float, minimum: float) -> None:
    """Raises ConfigError unless ``value >= minimum`` (NaN fails)."""
    if not value >= minimum:
        raise ConfigError(f"{name}={value} is too small; it must be at least {minimum}.")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    global_size: int = 512  # samples per optimizer step, over all ranks
    micro_size: int = 8  # samples per rank per forward pass

    def __post_init__(self) -> None:
        require_at_least("batch.global_size", self.global_size, 1)
        require_at_least("batch.micro_size", self.micro_size, 1)

    def accumulation_steps(self, world_size: int) -> int:
        """Forward passes per optimizer step on each rank.

        Raises: ConfigError if the global batch is not a multiple of one pass over all ranks.
        """
        per_pass = self.micro_size * world_size
        if self.global_size % per_pass:
            below, above = self.global_size // per_pass * per_pass, math.ceil(self.global_size / per_pass) * per_pass
            nearest = " and ".join(str(n) for n in (below, above) if n)
            raise ConfigError(
                f"batch.global_size={self.global_size} is not a multiple of batch.micro_size={self.micro_size} x "
                f"world_size={world_size} = {per_pass}; the nearest that work are {nearest}."
            )
        return self.global_size // per_pass


def share_batch(batch_size: int, accum: int, world_size: int) -> int:
    """Samples per process and forward pass, from the options ``training.batch_size`` and ``training.accum``.

    Raises: ConfigError if the batch cannot be shared out evenly, with the nearest sizes that can.
    """
    passes = accum * world_size
    if batch_size % passes == 0:
        return batch_size // passes
    below = batch_size // passes * passes
    sizes = " and ".join(str(size) for size in (below, below + passes) if size)
    reason = (
        f"training.batch_size={batch_size} cannot be shared out evenly: training.accum={accum} x "
        f"world_size={world_size} = {passes} forward passes per step. The nearest batch sizes that work: {sizes}"
    )
    if batch_size % world_size == 0:
        per_rank = batch_size // world_size
        divisors = [count for count in range(1, per_rank + 1) if per_rank % count == 0]
        near = sorted(sorted(divisors, key=lambda count: abs(count - accum))[:2])
        reason += f"; or training.accum={' or '.join(map(str, near))}"
    raise ConfigError(reason + ".")


def require_processes(ngpus: int | None, world_size: int, paper: str) -> None:
    """Raises ConfigError unless as many processes were started as ``ngpus`` expects."""
    if ngpus is not None and ngpus != world_size:
        raise ConfigError(
            f"ngpus={ngpus} does not fit the {world_size} process{'' if world_size == 1 else 'es'} started; launch "
            f"{ngpus} (NPROC={ngpus} bash scripts/{paper}/train_torchrun.sh ...) or leave ngpus out."
        )


@dataclass(frozen=True, kw_only=True)
class KeepConfig:
    """Which resumable checkpoints stay; another option says how often one is written."""

    keep_last: int = 2  # the newest so many
    keep_every: int = 0  # also every one whose step is a multiple of this; 0: none

    def __post_init__(self) -> None:
        CheckpointConfig(keep_last=self.keep_last, keep_every=self.keep_every)  # its checks


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    optimizer: Literal["AdamW", "Adam", "AdamW8bit", "LAMB"] = "AdamW"  # AdamW8bit: a quarter of AdamW's memory
    lr: float = 3e-4  # peak learning rate
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: int = 2500  # steps of linear warm-up: lr at step s (from 1) is lr * min(s / warmup, 1); 0 disables
    warmup_factor: float = 0.0  # cosine_lagged, *_epochs: share of lr that the warm-up starts from
    grad_clip: float = 1.0  # largest global gradient norm; negative disables clipping
    # shape of the rate after warm-up
    schedule: Literal[
        "constant", "cosine", "wsd", "cosine_constant", "cosine_lagged",
        "cosine_epochs", "multistep_epochs", "exponential_epochs",
    ] = "constant"  # fmt: skip
    min_ratio: float = 0.0  # floor of the rate where it falls, as a share of lr
    decay_fraction: float = 0.2  # share of the run in which the rate falls: its end (wsd) or start (cosine_constant)
    epoch_steps: int = 0  # *_epochs: steps per epoch, the unit of warm-up; 0: the data's
    milestones: tuple[int, ...] = ()  # multistep_epochs: epochs from which the rate is gamma times the last
    gamma: float = 0.1  # multistep_epochs, exponential_epochs: factor at a milestone, or after every epoch

    def __post_init__(self) -> None:
        require_choice("optim.optimizer", self.optimizer, OPTIMIZERS)
        require_choice("optim.schedule", self.schedule, SCHEDULES)
        require_at_least("optim.lr", self.lr, 0)
        require_at_least("optim.weight_decay", self.weight_decay, 0)
        require_at_least("optim.eps", self.eps, 0)
        require_at_least("optim.epoch_steps", self.epoch_steps, 0)
        require_at_least("optim.gamma", self.gamma, 0)
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for name in ("beta1", "beta2", "min_ratio", "decay_fraction", "warmup_factor"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name.startswith("beta") and value == 1):
                raise ConfigError(f"optim.{name}={value} must lie in [0, 1{')' if name.startswith('beta') else ']'}.")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    plan: Literal["none", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "none"
    activation_checkpointing: bool = False  # recompute each block in backward: less memory, about 1/3 more compute
    compile: bool = False  # torch.compile; can be slower on CPU

    def __post_init__(self) -> None:
        require_choice("parallel.plan", self.plan, PLANS)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    interval_steps: int = 10_000  # a resumable checkpoint every so many steps (and at the end)
    keep_last: int = 2  # newest resumable checkpoints to keep
    keep_every: int = 0  # also keep for ever every checkpoint whose step is a multiple of this; 0: none

    def __post_init__(self) -> None:
        require_at_least("checkpoint.interval_steps", self.interval_steps, 1)
        require_at_least("checkpoint.keep_last", self.keep_last, 1)
        require_at_least("checkpoint.keep_every", self.keep_every, 0)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    tensorboard: bool = False
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "quintet"
    run_name: str | None = None  # None: the run folder's name
    progress: bool = True  # tqdm bar on the main process

    def __post_init__(self) -> None:
        require_choice("tracking.wandb", self.wandb, ("disabled", "offline", "online"))


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """All that ``common.trainer.fit`` needs to know; papers build it from their own option names."""

    run_dir: str
    total_steps: int
    seed: int = 0
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # autocast dtype; parameters stay float32
    ema_decay: float | None = 0.9999  # None: no moving average
    ema_warmup: bool = True  # the decay rises with the number of updates, so that short runs have an average too
    log_interval_steps: int = 50
    validate_interval_steps: int = 0  # 0: never
    nonfinite: Literal["stop", "skip"] = "stop"  # what to do when the loss or gradient norm is NaN or infinite
    allow_config_change: bool = False  # resume although the configuration differs from the saved one
    deterministic: bool = False  # torch.use_deterministic_algorithms

    def __post_init__(self) -> None:
        require_at_least("total_steps", self.total_steps, 1)
        require_at_least("log_interval_steps", self.log_interval_steps, 1)
        require_at_least("validate_interval_steps", self.validate_interval_steps, 0)
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("nonfinite", self.nonfinite, ("stop", "skip"))
        if self.optim.optimizer == "LAMB" and self.parallel.plan not in WHOLE_PARAMETER_PLANS:
            raise ConfigError(
                f"optim.optimizer=LAMB scales each update by the norm of the whole parameter, which parallel.plan="
                f"{self.parallel.plan} shards; use parallel=ddp, or optim.optimizer=AdamW."
            )
        if self.optim.optimizer == "AdamW8bit" and self.parallel.plan not in WHOLE_PARAMETER_PLANS:
            raise ConfigError(
                f"optim.optimizer=AdamW8bit keeps its state in blocks of whole parameters, which "
                f"parallel.plan={self.parallel.plan} shards; use optim.optimizer=AdamW, whose state is then shared out "
                "over the processes, or parallel=ddp."
            )
        if self.optim.schedule in EPOCH_SCHEDULES and not self.optim.epoch_steps:
            raise ConfigError(
                f"optim.schedule={self.optim.schedule} changes the rate between epochs, and this run's data have none; "
                "set optim.epoch_steps to steps per epoch, or choose another schedule."
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay={self.ema_decay} must lie in [0, 1); null switches the moving average off.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the options of every training run begin with; a paper's ``TrainConfig`` adds its own."""

    name: str
    run_dir: str  # one folder per run; the same folder again continues the run
    seed: int = 0
    ngpus: int | None = None  # number of processes this run expects; null: as many as were started
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    nonfinite: Literal["stop", "skip"] = "stop"  # on a NaN or infinite loss or gradient
    deterministic: bool = False  # only deterministic kernels; slower on GPUs
    allow_config_change: bool = False  # continue a run although its options differ from the saved ones
    dry_run: bool = False  # print parameters, operations and memory; train nothing
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig(plan="ddp"))
    checkpoint: KeepConfig = field(default_factory=KeepConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        require_at_least("seed", self.seed, 0)
        require_choice("precision", self.precision, PRECISIONS)
        if not self.run_dir:
            raise ConfigError("run_dir is empty; give the folder of this run, for example run_dir=runs/first.")
        if self.ngpus is not None:
            require_at_least("ngpus", self.ngpus, 1)

    def engine_config(self, *, save_steps: int, **options: Any) -> TrainerConfig:
        """What the engine needs: these options, and those of ``TrainerConfig`` that only the paper knows.

        Args:
            save_steps: between resumable checkpoints.
            options: ``total_steps``, ``batch``, ``ema_decay`` and others; they win over the run's own.
        """
        kept = self.checkpoint
        checkpoint = CheckpointConfig(interval_steps=save_steps, keep_last=kept.keep_last, keep_every=kept.keep_every)
        shared = ("run_dir", "seed", "optim", "parallel", "tracking", "precision", "nonfinite", "allow_config_change",
                  "deterministic")  # fmt: skip
        own = {name: getattr(self, name) for name in shared}
        return TrainerConfig(**own | {"checkpoint": checkpoint} | options)
