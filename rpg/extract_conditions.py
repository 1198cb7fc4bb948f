"""Conditions of task checkpoints from example images or sentences, as ``data.conditions_file`` takes them.

    python -m rpg.extract_conditions checkpoints=tasks output=tasks_images.json examples=5
    python -m rpg.train data.checkpoints=tasks data.condition=file data.conditions_file=tasks_images.json \\
        ++model.condition=full ++model.d_condition=128 run_dir=runs/images
    python -m rpg.generate generator=runs/images images=[a.png,b.png] encoder=digits output=from_images

Options: ``--help``.
"""

import sys

from common.cli import run
from rpg.condition_extraction import ExtractConfig, extract_conditions


def main(config: ExtractConfig) -> None:
    table = extract_conditions(config)
    size = len(next(iter(table.values())))
    print(f"{len(table)} conditions of {size} numbers in {config.output}")


if __name__ == "__main__":
    sys.exit(run(main, "extract_conditions", ExtractConfig, "configs/rpg", print_config=False))
