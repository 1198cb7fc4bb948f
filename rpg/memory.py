"""Measures what a training run takes: ten steps with the options of ``rpg.train``, seconds and peak memory.

    python -m rpg.memory experiment=digits_minutes data.checkpoints=DIR
    python -m rpg.memory data.checkpoints=DIR data.dim_per_token=1024 model=m1024 training.rows_per_pass=128

``python -m rpg.train ... dry_run=true`` estimates the same without checkpoints, for every parallel plan.
"""

import sys

from common import cli
from common.report.tables import Table, print_tables
from rpg.config import TrainConfig
from rpg.training_memory import measure_training


def main() -> int:
    """The command line."""
    return cli.run(run, "train", TrainConfig, "configs/rpg", print_config=False)


def run(config: TrainConfig) -> int:
    """Measures and prints."""
    found = measure_training(config)
    if cli.is_main_process():
        rows = [[name.replace("_", " "), value] for name, value in found.items()]
        print_tables([Table(name="memory", columns=["quantity", "value"], rows=rows, caption="Training, per process.")])
    return 0


if __name__ == "__main__":
    sys.exit(main())
