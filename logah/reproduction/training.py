"""The hypernetworks of the reproduction, trained through the engine; float32 on the CPU."""

import shutil
import time
from pathlib import Path

import torch

from common.config import KeepConfig, OptimConfig, ParallelConfig, TrackingConfig
from common.reproduction.curves import training_curve
from common.reproduction.jobs import Interrupted
from logah.architecture_config import NetsSection
from logah.checkpoints import load_hypernetwork
from logah.config import TrainConfig, TrainingConfig
from logah.meta_learner import MetaLearner
from logah.reproduction.data import data_section
from logah.reproduction.settings import VISION, Arm, Settings
from logah.reproduction.starts import PATCH_SIZE
from logah.training import run_training

NUM_CLASSES = 10


def train_config(
    settings: Settings, arm: Arm, *, seed: int, run_dir: str, init_from: str | None = None, first: bool = False
) -> TrainConfig:
    """The run as ``logah.train`` would receive it.

    Args:
        init_from: hypernetwork to continue with.
        first: the stage before, see ``train``.
    """
    is_vision = arm.kind == VISION
    space = settings.space_of(arm.kind)
    steps = arm.first_steps if first else arm.steps
    model = {
        "decoder": arm.decoder,
        "hid": settings.hid,
        "layers": settings.layers,
        "heads": settings.heads,
        "lora_r": settings.lora_r,
        "max_ck_lora": settings.max_ck_lora,
        "max_shape": arm.max_shape,
        "normalisation": "fan_in",  # also of language models: unit_std takes the scale of a tensor away
        "class_token_noise": settings.class_token_noise if is_vision and not first else 0.0,
    }
    return TrainConfig(
        name=f"reproduction-{arm.name}",
        run_dir=run_dir,
        seed=seed,
        init_from=init_from,
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
            steps=steps,
            norm_penalty=settings.norm_penalty,
            log_freq=max(1, steps // 300),
            save_freq=max(1, steps // 3),
            interm_epoch=0,
            valid_epoch=0,  # unseen nets are scored afterwards
        ),
        optim=OptimConfig(
            lr=arm.lr,
            warmup=settings.warmup,
            weight_decay=settings.weight_decay,
            schedule="constant" if first else "cosine",
            min_ratio=0.0,
            grad_clip=settings.grad_clip,
        ),
        parallel=ParallelConfig(plan="none"),
        checkpoint=KeepConfig(keep_last=1),
        tracking=TrackingConfig(progress=False),
    )


def num_parameters(settings: Settings, arm: Arm) -> int:
    """Of an arm's hypernetwork, trained or not."""
    with torch.device("meta"):
        model = MetaLearner(train_config(settings, arm, seed=0, run_dir="-").model_config(num_classes=NUM_CLASSES))
    return sum(parameter.numel() for parameter in model.parameters())


def train(settings: dict, arm: str, seed: int, run_dir: str) -> dict:
    """Trains one hypernetwork (or continues it); its curve and size.

    Vision in two stages. The class token of the nets is zero but for its position's row, which no node of the graph
    gives, and a layer norm comes right after: whatever stands in that row reaches the first layer at full size. With a
    random row from the start the hypernetwork learns several times more slowly, with a zero row its nets are lost as
    soon as their class token moves. So the row is zero first and random then.

    Raises: Interrupted if a signal stopped it; the run folder then holds a checkpoint to continue from.
    """
    chosen = Settings.from_dict(settings)
    which = chosen.arm(arm)
    began = time.process_time()
    folders, curve, init_from = [run_dir], None, None
    if which.first_steps:
        init_from = str(Path(run_dir) / "first")
        folders.append(init_from)
        curve = run_stage(train_config(chosen, which, seed=seed, run_dir=init_from, first=True))
    config = train_config(chosen, which, seed=seed, run_dir=run_dir, init_from=init_from)
    curve = joined(curve, run_stage(config), which.first_steps)
    for folder in folders:  # after both stages, so that an interrupted one finds its way; the exports stay
        shutil.rmtree(Path(folder) / "checkpoints", ignore_errors=True)
    model = load_hypernetwork(run_dir).model
    return {
        **curve,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": time.process_time() - began,
    }


def run_stage(config: TrainConfig) -> dict:
    """The training curve of one run of the engine, which may continue an interrupted one."""
    done = run_training(config)
    if done.stopped_early:
        raise Interrupted(
            f"training in {config.run_dir} was stopped at step {done.step}; run the same command to continue"
        )
    return training_curve(Path(config.run_dir) / "metrics.jsonl")


def joined(first: dict | None, second: dict, steps: int) -> dict:
    """Two curves as one, the second ``steps`` later."""
    if first is None:
        return second
    later = {**second, "steps": [step + steps for step in second["steps"]]}
    return {**later, **{name: first[name] + later[name] for name in ("steps", "losses")}}
