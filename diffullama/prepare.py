"""Prepares data: token caches, packed LITPKDS files, clean text, pairs of prompt and answer.

    python -m diffullama.prepare source=embedded tokenizer=bpe:1024
    python -m diffullama.prepare source=fineweb format=jsonl limit=1000000 output=data/fineweb
    python -m diffullama.prepare source='data/slim/*.jsonl' format=packed tokenizer=NAME output=data/slimpajama
    python -m diffullama.prepare source=arithmetic format=pairs output=data/arithmetic

The same command again continues, or says that everything is there.
"""

import sys

from common import cli
from diffullama.preparation import PrepareConfig, prepare


def main() -> int:
    """The command line."""
    return cli.run(run, "prepare", PrepareConfig, "configs/diffullama")


def run(config: PrepareConfig) -> int:
    """Prepares as configured and prints what there is."""
    print(prepare(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
