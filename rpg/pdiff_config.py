"""Options of ``python -m rpg.train_pdiff`` and ``rpg.generate_pdiff``. Batch sizes are networks over all processes."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from common.config import (
    PRECISIONS,
    BatchConfig,
    RunConfig,
    TrainerConfig,
    require_at_least,
    require_choice,
    require_processes,
    share_batch,
)
from common.errors import ConfigError
from rpg.data import DataSection
from rpg.pdiff import PdiffConfig
from rpg.sampling import SamplerConfig

FORMATS = ("pth", "safetensors", "peft")
VAE_FOLDER = "vae"  # of the run folder: the run of the autoencoder, where a diffusion follows


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Length and batch of one stage."""

    batch_size: int = 16  # networks per optimizer step, over all processes
    accum: int = 1  # forward passes per step and process
    n_iters: int = 2000  # optimizer steps
    log_freq: int = 50  # steps between records in metrics.jsonl
    save_freq: int = 1000  # steps between resumable checkpoints
    ema: float | None = 0.999  # decay of the moving average of the weights; null: none, as released
    ema_warmup: bool = True  # the decay rises with the number of updates
    lr: float | None = None  # peak learning rate; null: optim.lr
    sample_freq: int = 0  # steps between generated networks, which data.tester tests; 0: never

    def check(self, name: str) -> None:
        """Raises ConfigError for a value that cannot work; ``name`` is the section's."""
        for option in ("batch_size", "accum", "n_iters", "log_freq", "save_freq"):
            require_at_least(f"{name}.{option}", getattr(self, option), 1)
        require_at_least(f"{name}.sample_freq", self.sample_freq, 0)
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ConfigError(f"{name}.ema={self.ema} must lie in [0, 1); null switches the moving average off.")
        if self.lr is not None:
            require_at_least(f"{name}.lr", self.lr, 0)


@dataclass(frozen=True, kw_only=True)
class PdiffSampling(SamplerConfig):
    """How networks are drawn, and how many when training has ended."""

    num_generated: int = 10  # networks that a finished run draws into run_dir/generated; 0: none
    batch_size: int = 8  # networks drawn together; no result depends on it

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("sampling.num_generated", self.num_generated, 0)
        require_at_least("sampling.batch_size", self.batch_size, 1)
        if self.guidance != 1:
            raise ConfigError(
                f"sampling.guidance={self.guidance} needs a condition, which p-diff does not have; use 1."
            )


@dataclass(frozen=True, kw_only=True)
class PdiffTrainConfig(RunConfig):
    """Everything that ``rpg.train_pdiff`` reads."""

    name: str = "pdiff"
    run_dir: str = "runs/pdiff"  # one folder per run; the same folder again continues the run
    architecture: str | None = None  # dry_run without checkpoints: a recipe, timm:<network> or tokens:<count>
    model: PdiffConfig = field(default_factory=PdiffConfig)
    data: DataSection = field(default_factory=lambda: DataSection(granularity=0, dim_per_token=64, fill_value=0.0))
    training: StageConfig = field(default_factory=StageConfig)  # of the diffusion; of the autoencoder if it is alone
    vae_training: StageConfig = field(default_factory=StageConfig)  # of the autoencoder before the diffusion
    sampling: PdiffSampling = field(default_factory=PdiffSampling)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.granularity != 0:
            raise ConfigError(
                f"data.granularity={self.data.granularity} cuts tensors into tokens, but p-diff takes the whole "
                "network as one vector; use data.granularity=0 (or python -m rpg.train)."
            )
        if self.data.condition != "none":
            raise ConfigError(
                f"data.condition={self.data.condition} cannot be used: p-diff has no condition; use "
                "data.condition=none (or python -m rpg.train)."
            )
        self.training.check("training")
        self.vae_training.check("vae_training")
        if self.model.has_diffusion:
            self.sampling.evaluations(self.model.diffusion_steps)

    def trainer_config(self, stage: StageConfig, run_dir: Path, world_size: int) -> TrainerConfig:
        """What the engine needs of one stage.

        Raises: ConfigError if the batch or ``ngpus`` does not fit the number of processes.
        """
        require_processes(self.ngpus, world_size, "rpg")
        return self.engine_config(
            run_dir=str(run_dir),
            total_steps=stage.n_iters,
            batch=BatchConfig(
                global_size=stage.batch_size, micro_size=share_batch(stage.batch_size, stage.accum, world_size)
            ),
            optim=self.optim if stage.lr is None else replace(self.optim, lr=stage.lr),
            save_steps=stage.save_freq,
            ema_decay=stage.ema,
            ema_warmup=stage.ema_warmup,
            log_interval_steps=stage.log_freq,
        )


@dataclass(frozen=True, kw_only=True)
class PdiffGenerateConfig:
    """Everything that ``rpg.generate_pdiff`` reads."""

    generator: str  # run folder or exported folder
    output: str  # folder of the generated networks
    num_generated: int = 10
    seed: int = 0
    format: Literal["pth", "safetensors", "peft"] = "pth"
    overwrite: bool = False  # replace files of the same names
    append: bool = False  # number the files on from those that are there
    batch_size: int = 8  # networks drawn together; no result depends on it
    test: bool = False  # test each network with the tester of the run
    device: str | None = None  # null: this process's GPU, else the CPU
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"  # of the network; the sampler's state is float32
    sampling: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        require_at_least("num_generated", self.num_generated, 1)
        require_at_least("seed", self.seed, 0)
        require_at_least("batch_size", self.batch_size, 1)
        require_choice("format", self.format, FORMATS)
        require_choice("precision", self.precision, PRECISIONS)
        if self.sampling.guidance != 1:
            raise ConfigError(
                f"sampling.guidance={self.sampling.guidance} needs a condition, which p-diff does not have."
            )
