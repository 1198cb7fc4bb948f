"""Trainings of a few steps on the embedded digits."""

from pathlib import Path
from typing import Any

from common.config import KeepConfig, OptimConfig, ParallelConfig, TrackingConfig
from logah.checkpoints import save_hypernetwork
from logah.data_config import DataSection
from logah.finetune_config import FinetuneConfig, FinetuneTraining
from tests.logah.tiny_hypernetwork import tiny_hypernetwork

TARGET = {"family": "vit", "patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "image_size": 8}


def write_hypernetwork(folder: Path, variant: str = "vision") -> str:
    """An untrained one, ready to predict."""
    return str(save_hypernetwork(folder, tiny_hypernetwork(variant=variant, seed=4), {}))


def finetune_config(run_dir: Path, **changes: Any) -> FinetuneConfig:
    """Six steps, evaluated after every third; ``training``, ``data`` and ``optim`` change sections."""
    training = {"steps": 6, "evaluate_steps": 3, "evaluate_on": "test", "log_freq": 1} | changes.pop("training", {})
    data = {"batch_size": 16, "limit_train": 64, "limit_test": 40} | changes.pop("data", {})
    optim = {"lr": 1e-2, "warmup": 0} | changes.pop("optim", {})
    options = {"target": TARGET, "precision": "fp32"} | changes
    return FinetuneConfig(
        run_dir=str(run_dir),
        training=FinetuneTraining(**training),
        data=DataSection(**data),
        optim=OptimConfig(**optim),
        parallel=ParallelConfig(plan=options.pop("plan", "none")),
        checkpoint=KeepConfig(keep_last=1),
        tracking=TrackingConfig(progress=False),
        **options,
    )
