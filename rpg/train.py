"""Trains a generator of networks on a folder of checkpoints; the same command again continues the run.

    python -m rpg.train experiment=digits_minutes data.checkpoints=DIR run_dir=runs/digits      minutes on a laptop
    python -m rpg.train data.checkpoints=DIR run_dir=runs/mine data.dim_per_token=1024 model=m1024
    python -m rpg.train experiment=main_vittiny_8192 dry_run=true                size, operations, memory per plan
    NPROC=4 bash scripts/rpg/train_torchrun.sh experiment=main_vitbase_16384 data.checkpoints=DIR

The run folder holds config.json, metrics.jsonl, checkpoints/, generated/ with tests.jsonl and, once trained, export/,
which ``python -m rpg.generate generator=RUN_DIR`` draws networks from. Exit code 85 and a file REQUEUE in the run
folder: a signal stopped it.
"""

import sys

from common import cli
from rpg.config import TrainConfig
from rpg.cost import print_cost
from rpg.training import EXPORT_FOLDER, run_training

CONFIG_DIR = "configs/rpg"


def main() -> int:
    """The command line."""
    return cli.run(train, "train", TrainConfig, CONFIG_DIR)


def train(config: TrainConfig) -> int:
    """Trains as configured, or prints what that would cost.

    Returns: 0, or ``cli.EXIT_REQUEUE`` if a signal stopped the run.
    """
    if config.dry_run:
        print_cost(config)
        return 0
    done = run_training(config)
    if done.stopped_early:
        return cli.EXIT_REQUEUE
    if cli.is_main_process():
        loss = done.metrics.get("train/loss")
        shown = "" if loss is None else f", loss {loss:.4f}"
        print(f"step {done.step}{shown}; generator in {done.run_dir / EXPORT_FOLDER}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
