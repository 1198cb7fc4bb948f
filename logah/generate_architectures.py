"""Draws a set of small networks to train a hypernetwork on, as one JSON description per line, and describes it.

    python -m logah.generate_architectures set=vits1k count=1000 seed=1 out=data/vits1k.jsonl
    python -m logah.generate_architectures set=gpts1k count=1000 seed=1 out=data/gpts1k.jsonl figure=gpts1k.png
    python -m logah.generate_architectures describe=data/vits1k.jsonl

Options: ``--help``.
"""

import sys

from common import cli
from common.report.tables import print_tables
from logah.architecture_generation import GenerateArchitecturesConfig, generate_set, provenance_line


def main() -> int:
    return cli.run(run, "generate_architectures", GenerateArchitecturesConfig, "configs/logah", print_config=False)


def run(config: GenerateArchitecturesConfig) -> None:
    print_tables(generate_set(config).tables, config.describe or config.set)
    if config.out is not None:
        print(provenance_line(config))


if __name__ == "__main__":
    sys.exit(main())
