"""Scores predicted networks: top-1 and top-5, or perplexity, with standard errors; statistics of their parameters.

    python -m logah.evaluate checkpoint=runs/logah targets=[vit_b_cifar] data=cifar100
    python -m logah.evaluate checkpoint=runs/logah-gpt2 targets=[gpt2-large] data=wikitext103
    python -m logah.evaluate checkpoint=ghn3tm8.pt suite=torchvision data=imagenet data.root=DIR
    python -m logah.evaluate predictions=[predictions/vit,runs/finetune/runs/random-seed0-lr0.001] data=digits

Options: ``--help``. A stopped evaluation of a suite continues.
"""

import sys

from common import cli
from logah.evaluation import evaluate
from logah.evaluation_config import EvaluateConfig


def main() -> int:
    """The command line."""
    return cli.run(run, "evaluate", EvaluateConfig, "configs/logah")


def run(config: EvaluateConfig) -> int:
    """Evaluates as configured."""
    evaluate(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
