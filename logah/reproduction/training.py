"""The hypernetworks of the reproduction, trained through the engine; float32 on the CPU."""

import shutil
import time
from pathlib import Path

from common.config import KeepConfig, OptimConfig, ParallelConfig, TrackingConfig
from common.reproduction.curves import training_curve
from common.reproduction.jobs import Interrupted
from logah.architecture_config import NetsSection
from logah.checkpoints import load_hypernetwork
from logah.config import TrainConfig, TrainingConfig
from logah.reproduction.data import data_section
from logah.reproduction.settings import VISION, Arm, Settings
from logah.reproduction.starts import PATCH_SIZE
from logah.training import run_training


def train_config(settings: Settings, arm: Arm, *, seed: int, run_dir: str) -> TrainConfig:
    """The run as ``logah.train`` would receive it."""
    is_vision = arm.kind == VISION
    space = settings.space_of(arm.kind)
    model = {
        "decoder": arm.decoder,
        "hid": settings.hid,
        "layers": settings.layers,
        "heads": settings.heads,
        "lora_r": settings.lora_r,
        "max_ck_lora": settings.max_ck_lora,
        "max_shape": arm.max_shape,
        "normalisation": "fan_in",  # also of language models: unit_std takes the scale of a tensor away
        "class_token_noise": settings.class_token_noise if is_vision else 0.0,
    }
    return TrainConfig(
        name=f"reproduction-{arm.name}",
        run_dir=run_dir,
        seed=seed,
        precision="fp32",
        model=model,
        data=data_section(settings, arm.kind),
        nets=NetsSection(
            law="grid",
            family="vit" if is_vision else "gpt2",
            depths=space.depths,
            widths=space.widths,
            heads=space.heads,
            patch_sizes=(PATCH_SIZE,) if is_vision else None,
            dropout=0.0,
        ),
        training=TrainingConfig(
            steps=arm.steps,
            norm_penalty=settings.norm_penalty,
            log_freq=max(1, arm.steps // 300),
            save_freq=max(1, arm.steps // 3),
            interm_epoch=0,
            valid_epoch=0,  # unseen nets are scored afterwards
        ),
        optim=OptimConfig(
            lr=arm.lr,
            warmup=settings.warmup,
            weight_decay=settings.weight_decay,
            schedule="cosine",
            min_ratio=0.0,
            grad_clip=settings.grad_clip,
        ),
        parallel=ParallelConfig(plan="none"),
        checkpoint=KeepConfig(keep_last=1),
        tracking=TrackingConfig(progress=False),
    )


def train(settings: dict, arm: str, seed: int, run_dir: str) -> dict:
    """Trains one hypernetwork (or continues it); its curve and size.

    Raises: Interrupted if a signal stopped it; the run folder then holds a checkpoint to continue from.
    """
    chosen = Settings.from_dict(settings)
    began = time.process_time()
    done = run_training(train_config(chosen, chosen.arm(arm), seed=seed, run_dir=run_dir))
    if done.stopped_early:
        raise Interrupted(f"training in {run_dir} was stopped at step {done.step}; run the same command to continue")
    shutil.rmtree(Path(run_dir) / "checkpoints", ignore_errors=True)  # the export stays
    model = load_hypernetwork(run_dir).model
    return {
        **training_curve(Path(run_dir) / "metrics.jsonl"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": time.process_time() - began,
    }
