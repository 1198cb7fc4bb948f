"""A folder of tiny checkpoints and short runs on it, for tests of training."""

from pathlib import Path
from typing import Any

import torch

from common.config import KeepConfig, OptimConfig, ParallelConfig, TrackingConfig
from rpg.checkpoint_files import write_checkpoint
from rpg.config import TrainConfig, TrainingConfig
from rpg.data import DataSection
from rpg.sampling import SamplerConfig

MODEL: dict[str, Any] = {
    "d_model": 16, "d_state": 8, "headdim": 8, "channels": [1, 4, 8, 4, 1], "kernel_size": 3, "diffusion_steps": 40,
    "chunk_size": 4,
}  # fmt: skip
SHAPES = {"first.weight": (6, 5), "first.bias": (6,), "norm.running_var": (6,), "last.weight": (3, 6)}


def write_folder(folder: Path, names: list[str], seed: int = 0) -> Path:
    """One checkpoint per name; those with the same text before ``_acc`` differ as much as others."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(seed)
    for name in names:
        state = {key: torch.randn(shape, generator=rng) * 0.1 + 1 for key, shape in SHAPES.items()}
        state["norm.running_var"] = state["norm.running_var"].abs()
        state["norm.num_batches_tracked"] = torch.tensor(7)
        write_checkpoint(folder / name, state, "safetensors")
    return folder


def plain_folder(folder: Path, count: int = 5) -> Path:
    """Checkpoints of two independent trainings."""
    return write_folder(folder, [f"{n:04d}_acc0.9000_seed{n % 2:04d}_tiny.safetensors" for n in range(count)])


def task_folder(folder: Path, tasks: tuple[int, ...] = (3, 500, 1000)) -> Path:
    """Two checkpoints of each task."""
    names = [f"{n:04d}_acc0.9000_class{task:04d}_tiny.safetensors" for task in tasks for n in (1, 2)]
    return write_folder(folder, names)


def run_config(run_dir: Path, checkpoints: Path, **changes: Any) -> TrainConfig:
    """A run of a few steps; ``model``, ``data``, ``training`` and others change sections."""
    training = {"batch_size": 4, "n_iters": 4, "diffusion_batch": 16, "log_freq": 1, "save_freq": 2, "ema": 0.5}
    data = {"checkpoints": str(checkpoints), "dim_per_token": 16}
    return TrainConfig(
        run_dir=str(run_dir),
        seed=3,
        precision="fp32",
        allow_config_change=True,
        model=MODEL | changes.pop("model", {}),
        data=DataSection(**data | changes.pop("data", {})),
        training=TrainingConfig(**training | changes.pop("training", {})),
        optim=OptimConfig(lr=1e-2, warmup=0, eps=1e-4),  # a bias before a batch norm has no gradient but rounding
        sampling=SamplerConfig(**{"steps": 5} | changes.pop("sampling", {})),
        parallel=ParallelConfig(plan=changes.pop("plan", "none")),
        checkpoint=KeepConfig(keep_last=4),
        tracking=TrackingConfig(progress=False),
        **changes,
    )
