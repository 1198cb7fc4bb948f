"""The generators of the reproduction: real checkpoint folders, real engine, float32 on the CPU."""

import shutil
from pathlib import Path

from common.config import KeepConfig, OptimConfig, ParallelConfig, TrackingConfig
from common.reproduction.curves import training_curve
from common.reproduction.jobs import Interrupted
from rpg.config import TrainConfig, TrainingConfig
from rpg.data import DataSection
from rpg.loading import load_generator
from rpg.reproduction.settings import Arm, Settings
from rpg.training import run_training


def train_config(settings: Settings, arm: Arm, *, seed: int, run_dir: str, folder: str) -> TrainConfig:
    """The run as ``rpg.train`` would receive it.

    Args:
        folder: of checkpoints.
    """
    model = {
        "d_model": settings.dim_per_token,
        "d_state": settings.d_state,
        "channels": settings.channels,
        "prediction": arm.prediction,
    }
    if arm.condition != "none":
        model |= {"condition": arm.condition, "d_condition": settings.d_condition, "gate": arm.gate}
    return TrainConfig(
        name=f"reproduction-{arm.name}",
        run_dir=run_dir,
        seed=seed,
        precision="fp32",
        model=model,
        data=DataSection(
            name=arm.collection,
            checkpoints=folder,
            # generators of one collection may be trained at the same time
            cache_dir=str(Path(run_dir) / "tokens"),
            dim_per_token=settings.dim_per_token,
            normalisation=arm.normalisation,
            groups=arm.groups,
            condition="none" if arm.condition == "none" else "class",
        ),
        training=TrainingConfig(
            batch_size=arm.batch_size,
            n_iters=arm.steps,
            diffusion_batch=arm.diffusion_batch,
            states="none" if arm.groups == "none" else "groups",
            log_freq=max(1, arm.steps // 300),
            save_freq=max(1, arm.steps // 3),
            ema=None,
        ),
        optim=OptimConfig(lr=arm.lr, warmup=0, weight_decay=0.0, schedule="cosine", min_ratio=0.0, grad_clip=-1.0),
        parallel=ParallelConfig(plan="none"),
        checkpoint=KeepConfig(keep_last=1),
        tracking=TrackingConfig(progress=False),
    )


def train(settings: dict, arm: str, seed: int, run_dir: str, folder: str) -> dict:
    """Trains one generator (or continues it); its curve and size.

    Raises: Interrupted if a signal stopped it; the run folder then holds a checkpoint to continue from.
    """
    chosen = Settings.from_dict(settings)
    config = train_config(chosen, chosen.arm(arm), seed=seed, run_dir=run_dir, folder=folder)
    done = run_training(config)
    if done.stopped_early:
        raise Interrupted(f"training in {run_dir} was stopped at step {done.step}; run the same command to continue")
    shutil.rmtree(Path(run_dir) / "checkpoints", ignore_errors=True)  # the export stays
    shutil.rmtree(Path(run_dir) / "tokens", ignore_errors=True)
    model = load_generator(run_dir).model
    return {
        **training_curve(Path(run_dir) / "metrics.jsonl"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": model.config.num_tokens,
    }
