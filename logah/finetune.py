"""Trains a network from a prediction, random weights and other starts, side by side; the same command continues.

    python -m logah.finetune recipe=vit_digits inits='[random,hypernetwork:runs/logah]' run_dir=runs/compare
    python -m logah.finetune recipe=gpt2 inits='[prediction:predictions/gpt2-large]' run_dir=runs/gpt2-large
    python -m logah.finetune recipe=vit_cifar seeds=[0,1,2] lrs=[4e-5,1e-4,3e-4] \
        inits='[random,mimetic,logah@hypernetwork:runs/logah,ghn3@hypernetwork:ghn3tm8.pt]' run_dir=runs/four
    NPROC=6 bash scripts/logah/finetune_deepspeed.sh recipe=gpt2 'inits=[prediction:predictions/gpt2-large]'

The run folder holds results.json, section.html, tables and curves with bands, and runs/START-seedS-lrR/ with
checkpoints, metrics.jsonl and export/, which can be evaluated and started from. Options: ``--help``.
"""

import sys

from common import cli
from logah.finetune_config import FinetuneConfig
from logah.finetune_cost import print_cost
from logah.finetuning import finetune


def main() -> int:
    """The command line."""
    return cli.run(run, "finetune", FinetuneConfig, "configs/logah")


def run(config: FinetuneConfig) -> int:
    """Trains as configured, or prints what that would take.

    Returns: 0, or ``cli.EXIT_REQUEUE`` if a signal stopped it.
    """
    if config.dry_run:
        print_cost(config)
        return 0
    return cli.EXIT_REQUEUE if finetune(config).stopped_early else 0


if __name__ == "__main__":
    sys.exit(main())
