"""One run of ``python -m mup_dit.transfer``: trained by the engine, judged by its held-out loss."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from common import cli
from common.errors import ConfigError
from common.hooks import Hook
from common.trainer import FitResult
from mup_dit.arms import Arm, Repeated, run_arm, siblings
from mup_dit.sweep import ArmResult
from mup_dit.training import run_training
from mup_dit.transfer_config import TransferConfig, trainable_parameters

RATE_OPTIONS = ("mup.loglr", "run_dir", "name")  # in which runs may differ and still be compared step by step
TRIAL_OPTIONS = (*RATE_OPTIONS, "trial", "optim.grad_clip", "optim.warmup", "objective.repa_weight")


def run(config: TransferConfig) -> int:
    """Trains one run, or continues it; returns 0, or ``cli.EXIT_REQUEUE`` if a signal stopped it."""
    return 0 if train(config) is not None else cli.EXIT_REQUEUE


def train(config: TransferConfig) -> ArmResult | None:
    """The run's result; None if a signal stopped it.

    Raises: ConfigError without a base rate, or for ``training.epochs``, which would hide what a run costs.
    """
    config = config.with_drawn()
    if config.mup.loglr is None:
        raise ConfigError("mup.loglr has no value, and search.loglr is empty; give the rates, e.g. mup.loglr=-9,-8,-7.")
    if config.training.epochs is not None:
        raise ConfigError("training.epochs is not known here; give the length of a run as training.n_iters.")
    # held-out losses come after the last step, and more often if the options say so
    every = config.training.eval_freq or config.training.n_iters
    config = replace(config, training=replace(config.training, eval_freq=every))
    trainer = config.trainer_config(cli.world_size())
    run_dir, options = Path(config.run_dir), asdict(config)
    arm = Arm(
        width=config.network.network.hidden_size,
        loglr=config.mup.loglr,
        seed=config.seed,
        planned_steps=trainer.total_steps,
        batch_size=trainer.batch.global_size,
        parameters=trainable_parameters(config.network),
        settings=config.drawn or None,
    )

    draws = config.sweep.validation_draws

    def run_fit(hooks: Sequence[Hook]) -> FitResult:
        return run_training(
            config,
            trainer,
            lambda _: hooks,
            held_out=lambda dataset: Repeated(dataset, draws),
            max_held_out=config.eval.batch_size * draws,
        )

    result = run_arm(
        run_dir,
        arm,
        run_fit,
        options=options,
        others=lambda: siblings(run_dir, options, TRIAL_OPTIONS if config.drawn else RATE_OPTIONS),
        rule=config.sweep.stop,
        log_interval=config.training.log_freq,
        is_main=cli.is_main_process(),
    )
    if result is not None and not config.sweep.keep_checkpoints and cli.is_main_process():
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    return result
