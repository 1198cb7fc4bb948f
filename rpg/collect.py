"""Trains the networks of a recipe and saves the checkpoints that a generator learns from.

    python -m rpg.collect recipe=digits_cnn output=checkpoints/digits
    python -m rpg.collect recipe=cifar10_resnet18 recipe.data.download=true output=checkpoints/cifar10_resnet18
    python -m rpg.collect recipe=permutation_vittiny recipe.condition.values=3 processes=3 output=checkpoints/seeds
    python -m rpg.collect recipe=lora recipe.adapters.model=MODEL_FOLDER output=adapters/lora

The same command again continues a collection that was interrupted. Options: ``--help``.
"""

import sys

from common import cli
from rpg.collection import collect
from rpg.collection_config import CollectConfig


def main() -> int:
    """The command line."""
    return cli.run(run, "collect", CollectConfig, "configs/rpg", print_config=False)


def run(config: CollectConfig) -> int:
    """Collects as configured."""
    print(collect(config).summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
