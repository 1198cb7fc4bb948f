"""Downloads and prepares data once for all runs, and tells what is in them.

    python -m logah.prepare data=embedded
    python -m logah.prepare data=cifar100 data.download=true
    python -m logah.prepare data=wikitext103 data.cache_dir=/shared/data

The same command again checks that everything is there. Options: ``--help``.
"""

import sys

from common import cli
from logah.preparation import PrepareConfig, prepare


def main() -> int:
    """The command line."""
    return cli.run(run, "prepare", PrepareConfig, "configs/logah", print_config=False)


def run(config: PrepareConfig) -> int:
    """Prepares as configured and prints what there is."""
    print(prepare(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
