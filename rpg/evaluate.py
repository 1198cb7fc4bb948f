"""Evaluates generated networks: accuracy, novelty, baselines, ensembles, copies; tables, figures and a page.

    python -m rpg.evaluate originals=checkpoints generated=DIR tester.kind=python tester.target=my_module:MyTester
    python -m rpg.evaluate originals=checkpoints generator=runs/first num_generated=20 sampling.steps=50
    python -m rpg.evaluate originals=checkpoints generated=DIR          # weights alone: distances, copies, histograms

Options: ``--help``.
"""

import sys

from common import cli
from rpg.evaluation import evaluate
from rpg.evaluation_config import EvaluateConfig


def main() -> int:
    """The command line."""
    return cli.run(run, "evaluate", EvaluateConfig, "configs/rpg")


def run(config: EvaluateConfig) -> int:
    """Evaluates as configured."""
    evaluate(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
