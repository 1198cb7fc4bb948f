"""The runs of the reproduction: real digits, real engine, float32 on the CPU.

All runs of one seed see the same images, times and noise in the same order, and are judged by the same held-out
(image, time, noise) triples.
"""

import shutil
from dataclasses import asdict
from pathlib import Path

from common.config import BatchConfig, CheckpointConfig, OptimConfig, TrackingConfig, TrainerConfig
from common.data.loader import BatchedDataset, build_train_loader, build_validation_loader
from common.reproduction.jobs import Interrupted
from common.tracking import read_records
from common.trainer import fit
from mup_dit.arms import LOSS, Arm, Repeated, run_arm
from mup_dit.building import build_skeleton
from mup_dit.datasets import build_dataset
from mup_dit.objective import ObjectiveConfig
from mup_dit.reproduction.settings import Settings
from mup_dit.task import DiffusionTask


def digits(split: str) -> BatchedDataset:
    """The handwritten digits: 1536 to train on, 261 held out."""
    return build_dataset("digits", split, size=8, channels=1)


def trainer_config(settings: Settings, *, lr: float, steps: int, seed: int, run_dir: str, every: int) -> TrainerConfig:
    """When things happen, and the optimizer: constant rate, no decay, no clipping."""
    return TrainerConfig(
        run_dir=run_dir,
        total_steps=steps,
        seed=seed,
        batch=BatchConfig(global_size=settings.batch_size, micro_size=settings.batch_size),
        optim=OptimConfig(lr=lr, warmup=0, grad_clip=-1.0),
        checkpoint=CheckpointConfig(interval_steps=max(1, steps // 2), keep_last=1),
        tracking=TrackingConfig(progress=False),
        precision="fp32",
        ema_decay=settings.ema,
        log_interval_steps=settings.log_interval,
        validate_interval_steps=every,
    )


def train(
    settings: dict,
    parametrization: str,
    heads: int,
    loglr: float,
    seed: int,
    run_dir: str,
    steps: int | None = None,
    validation_points: int = 1,
) -> dict:
    """Trains one network (or continues it); returns its result and held-out losses.

    Args:
        steps: None: those of the sweep.
        validation_points: held-out losses, evenly along the run.

    Raises: Interrupted if a signal stopped it; the run folder then holds a checkpoint to continue from.
    """
    chosen = Settings.from_dict(settings)
    steps = steps or chosen.steps
    network = chosen.network(parametrization, heads)
    every = max(1, steps // validation_points)
    config = trainer_config(chosen, lr=2.0**loglr, steps=steps, seed=seed, run_dir=run_dir, every=every)
    held_out = Repeated(digits("validation"), chosen.validation_draws)
    options = {"trainer": asdict(config), "network": asdict(network), "settings": chosen.as_dict()}

    def run(hooks):
        return fit(
            DiffusionTask(network, ObjectiveConfig(), seed=seed),
            config,
            train_loader=build_train_loader(
                digits("train"), global_size=chosen.batch_size, micro_size=chosen.batch_size, seed=seed
            ),
            # one batch holds every image once, so that its stratified times cover all noise levels
            validation_loader=build_validation_loader(held_out, batch_size=len(held_out.dataset)),
            hooks=hooks,
            run_config=options,
        )

    arm = Arm(
        width=network.network.hidden_size,
        loglr=loglr,
        seed=seed,
        planned_steps=steps,
        batch_size=chosen.batch_size,
        parameters=sum(p.numel() for p in build_skeleton(network).parameters() if p.requires_grad),
    )
    result = run_arm(run_dir, arm, run, options=options, log_interval=chosen.log_interval)
    if result is None:
        raise Interrupted(f"training in {run_dir} was stopped; run the same command to continue")
    shutil.rmtree(Path(run_dir) / "checkpoints", ignore_errors=True)  # nothing reads the weights
    records = [record for record in read_records(Path(run_dir)) if record.get(LOSS) is not None]
    return {**result.as_dict(), "validation": [[record["step"], record[LOSS]] for record in records]}
