"""Scores LoRA and DoRA adapters of a language model on commonsense tasks: generated ones against originals.

    python -m rpg.commonsense language_model=MODEL originals=adapters generated=generated precision=fp32
    python -m rpg.commonsense language_model=MODEL generated=generated/generated_dora_001 tasks=[boolq,piqa] limit=100

Options: ``--help``.
"""

import sys

from common import cli
from rpg.adapter_evaluation import CommonsenseConfig, evaluate_adapters


def main() -> int:
    """The command line."""
    return cli.run(run, "commonsense", CommonsenseConfig, "configs/rpg")


def run(config: CommonsenseConfig) -> int:
    """Scores as configured."""
    evaluate_adapters(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
