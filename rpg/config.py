"""Options of ``python -m rpg.train``. Steps are optimizer steps; batch sizes and rows are over all processes."""

from dataclasses import dataclass, field, fields
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
from common.conversion import unknown_option
from common.errors import ConfigError
from rpg.data import DataSection
from rpg.model_config import DATA_DECIDES, GeneratorConfig
from rpg.sampling import SamplerConfig

STACKING = ("shared", "per_network")
STATES = ("auto", "groups", "none")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    batch_size: int = 8  # networks per optimizer step; their tokens come from all networks of the same source
    accum: int = 1  # forward passes per step and process
    n_iters: int = 80_000  # optimizer steps of the whole run
    diffusion_batch: int | None = 512  # tokens per optimizer step; null: every token of every network of the batch
    rows_per_pass: int | None = None  # tokens in the denoiser at a time; null: all
    # shared: the stack runs once per distinct (condition, state), and its tokens are drawn from all networks that share
    # them; per_network: once per network of the batch, as released
    stacking: Literal["shared", "per_network"] = "shared"
    states: Literal["auto", "groups", "none"] = "auto"  # auto: one per group, but none if conditions tell all apart
    drop_condition: float = 0.0  # share of networks trained without their condition, for classifier-free guidance
    log_freq: int = 50  # steps between records in metrics.jsonl
    save_freq: int = 2000  # steps between resumable checkpoints
    sample_freq: int = 0  # steps between generated networks, which data.tester tests; 0: never
    snapshot_freq: int = 0  # steps between exported generators, kept for ever; 0: at the end only
    ema: float | None = 0.999  # decay of the moving average of the weights; null: none (released)
    ema_warmup: bool = True

    def __post_init__(self) -> None:
        require_choice("training.stacking", self.stacking, STACKING)
        require_choice("training.states", self.states, STATES)
        for name in ("batch_size", "accum", "n_iters", "log_freq", "save_freq"):
            require_at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("sample_freq", "snapshot_freq", "drop_condition"):
            require_at_least(f"training.{name}", getattr(self, name), 0)
        for name in ("diffusion_batch", "rows_per_pass"):
            if getattr(self, name) is not None:
                require_at_least(f"training.{name}", getattr(self, name), 1)
        if self.drop_condition >= 1:
            raise ConfigError(f"training.drop_condition={self.drop_condition} must be below 1; 0.1 is usual.")
        if self.diffusion_batch is not None and self.diffusion_batch % self.batch_size:
            below = max(1, self.diffusion_batch // self.batch_size) * self.batch_size
            raise ConfigError(
                f"training.diffusion_batch={self.diffusion_batch} tokens cannot be shared out evenly among "
                f"training.batch_size={self.batch_size} networks; the nearest that work are {below} and "
                f"{below + self.batch_size}."
            )
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ConfigError(f"training.ema={self.ema} must lie in [0, 1); null switches the moving average off.")

    def tokens_per_network(self, num_tokens: int) -> int:
        """Denoiser rows that each network of the batch stands for."""
        return num_tokens if self.diffusion_batch is None else self.diffusion_batch // self.batch_size


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Everything that ``rpg.train`` reads."""

    name: str = "rpg"
    run_dir: str = "runs/rpg"  # one folder per run; the same folder again continues the run
    architecture: str | None = None  # dry_run without checkpoints: a recipe, timm:NAME, or tokens:N
    init_from: str | None = None  # start from the weights of a generator folder or released checkpoint
    model: dict[str, Any] = field(default_factory=dict)  # options of rpg/model_config.py
    data: DataSection
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplerConfig = field(default_factory=SamplerConfig)  # of networks drawn during training; kept with it

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_model()
        if self.training.drop_condition and self.model.get("condition", "none") == "none":
            raise ConfigError("training.drop_condition needs a condition to drop; set model.condition=full.")
        if self.sampling.guidance != 1 and not self.training.drop_condition:
            raise ConfigError(
                f"sampling.guidance={self.sampling.guidance} guides away from networks without a condition, which are "
                "trained by training.drop_condition=0.1; set that, or sampling.guidance=1."
            )

    def check_model(self) -> None:
        """Raises ConfigError for options of the network that are wrong whatever the data are."""
        self.generator_config(num_tokens=1, num_states=0, condition_size=10)

    def generator_config(self, *, num_tokens: int, num_states: int, condition_size: int) -> GeneratorConfig:
        """The network for data of these sizes.

        Raises: ConfigError for an unknown option, one that the data decide, or values that do not fit together.
        """
        names = [one.name for one in fields(GeneratorConfig)]
        for name in self.model:
            if name in DATA_DECIDES:
                raise ConfigError(f"model.{name} follows from the data; remove it and see data.*.")
            if name not in names:
                raise ConfigError(unknown_option(f"model.{name}", [f"model.{one}" for one in names]))
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in self.model.items()}
        used = options.get("condition", "none") != "none"
        return GeneratorConfig(
            num_tokens=num_tokens,
            dim_per_token=self.data.dim_per_token,
            num_states=num_states,
            condition_size=condition_size if used else 0,
            **options,
        )

    @cached_property
    def effective_states(self) -> str:
        """``training.states`` with ``auto`` decided: conditional generators have none."""
        if self.training.states != "auto":
            return self.training.states
        return "groups" if self.model.get("condition", "none") == "none" else "none"

    def trainer_config(self, world_size: int) -> TrainerConfig:
        """What the engine needs of this.

        Raises: ConfigError if the batch or ``ngpus`` does not fit the number of processes.
        """
        require_processes(self.ngpus, world_size, "rpg")
        training = self.training
        micro_size = share_batch(training.batch_size, training.accum, world_size)
        return self.engine_config(
            total_steps=training.n_iters,
            batch=BatchConfig(global_size=training.batch_size, micro_size=micro_size),
            save_steps=training.save_freq,
            ema_decay=training.ema,
            ema_warmup=training.ema_warmup,
            log_interval_steps=training.log_freq,
        )
