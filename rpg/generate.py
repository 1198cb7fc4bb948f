"""Generates networks: numbered state dicts or PEFT adapter folders, each with a record of seed, options and generator.

    python -m rpg.generate generator=runs/first num_generated=10 output=runs/first/generated test=true
    python -m rpg.generate generator=runs/tasks tasks=unseen num_generated=3 output=runs/tasks/unseen format=safetensors
    torchrun --nproc-per-node 2 -m rpg.generate generator=runs/large sampling.steps=100 output=runs/large/generated

The networks depend neither on their number nor on that of the processes. Options: ``--help``.
"""

import sys

from common.cli import run
from common.parallel import start
from rpg.generation_config import GenerateConfig
from rpg.generation_run import generate_networks


def main(config: GenerateConfig) -> None:
    with start("ddp") as parallel:
        generation = generate_networks(config, parallel)
        if parallel.is_main:
            print(generation.summary())


if __name__ == "__main__":
    sys.exit(run(main, "generate", GenerateConfig, "configs/rpg"))
