"""Trains a hypernetwork on sampled networks; the same command again continues the run.

    python -m logah.train experiment=digits_minutes run_dir=runs/digits           minutes on a laptop
    python -m logah.train experiment=cifar100_small data.root=data/images         ViTs-1K on CIFAR-100
    python -m logah.train experiment=wikitext2_gpt2_tiny                           GPTs-1K on WikiText-2
    NPROC=2 bash scripts/logah/train_torchrun.sh experiment=wikitext2_gpt2_tiny

The run folder holds config.json, metrics.jsonl, checkpoints/, epochs/ and, once trained, export/, from which
``python -m logah.predict checkpoint=RUN_DIR`` predicts networks. Exit code 85 and a file REQUEUE in the run folder:
a signal stopped it.
"""

import sys

from common import cli
from logah.config import TrainConfig
from logah.cost import print_cost
from logah.training import EXPORT_FOLDER, run_training

CONFIG_DIR = "configs/logah"


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
        shown = ", ".join(
            f"{name.split('/')[-1]} {done.metrics[name]:.4f}"
            for name in ("train/task_loss", "train/top1", "valid/task_loss", "valid/top1")
            if name in done.metrics
        )
        print(f"step {done.step}: {shown}; hypernetwork in {done.run_dir / EXPORT_FOLDER}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
