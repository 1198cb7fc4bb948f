"""Fine-tunes a generated network along a recipe, next to the same training from random weights.

    python -m rpg.finetune recipe=digits_cnn network=generated/generated_digits_001.pth output=runs/finetune
    python -m rpg.finetune recipe=finetune_vittiny network=generated_class0279.pth output=runs/finetune

Writes results.json, curve.csv and finetuned.safetensors. Options: ``--help``.
"""

import sys

from common import cli
from rpg.finetuning import FinetuneConfig, finetune, summary


def main() -> int:
    """The command line."""
    return cli.run(run, "finetune", FinetuneConfig, "configs/rpg", print_config=False)


def run(config: FinetuneConfig) -> int:
    """Fine-tunes as configured."""
    print(summary(finetune(config)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
