"""One training run, from options to the engine: what is trained, on what, with which hooks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from common import cli
from common.config import TrainerConfig
from common.data.loader import BatchedDataset, build_train_loader, build_validation_loader
from common.errors import ConfigError
from common.hooks import Hook
from common.trainer import FitResult, fit
from mup_dit.building import Network, build_model
from mup_dit.config import TrainConfig
from mup_dit.data import Data, build_data
from mup_dit.loading import load_weights_into
from mup_dit.task import DiffusionTask


def build_task(config: TrainConfig, data: Data | None) -> DiffusionTask:
    """What is trained; without data (for estimates) latents need no encoder."""

    def build() -> Network:
        model = build_model(config.network)
        if config.init_from is not None:
            load_weights_into(model, config.init_from, config.network)
        return model

    return DiffusionTask(
        config.network,
        config.objective,
        seed=config.seed,
        latent_scale=1.0 if data is None else data.latent_scale,
        encoder=None if data is None else data.encoder,
        features=None if data is None else data.features,
        decay_rule=config.mup.decay_rule,
        scale_eps=config.optim.eps if config.mup.scale_eps else None,
        build=build,
    )


def run_training(
    config: TrainConfig,
    trainer: TrainerConfig,
    hooks: Callable[[Data], Sequence[Hook]],
    *,
    held_out: Callable[[BatchedDataset], BatchedDataset] = lambda dataset: dataset,
    max_held_out: int | None = None,
) -> FitResult:
    """Reads the data and trains to the end, or to a signal.

    Args:
        hooks: made once the data are there.
        held_out: what is validated on, made from ``data.valid``.
        max_held_out: rows of it; None: ``eval.batch_size``.

    Raises: ConfigError if held-out losses are asked for without held-out data.
    """
    data = build_data(config.data, config.network, seed=config.seed)
    if config.training.epochs is not None:
        steps = math.ceil(config.training.epochs * len(data.train) / trainer.batch.global_size)
        trainer = replace(trainer, total_steps=max(1, steps))
    if config.training.eval_freq and data.valid is None:
        raise ConfigError("training.eval_freq asks for losses on held-out images; name data.valid, or set it to 0.")
    validation = None
    if config.training.eval_freq:
        validation = build_validation_loader(
            held_out(data.valid),
            batch_size=config.eval.micro_batch_size,
            max_samples=max_held_out or config.eval.batch_size,
        )
    return fit(
        build_task(config, data),
        trainer,
        train_loader=build_train_loader(
            data.train,
            global_size=trainer.batch.global_size,
            micro_size=trainer.batch.micro_size,
            seed=config.seed,
            rank=cli.rank(),
            world_size=cli.world_size(),
            num_workers=config.data.num_workers,
        ),
        validation_loader=validation,
        hooks=hooks(data),
        run_config=asdict(config),
    )
