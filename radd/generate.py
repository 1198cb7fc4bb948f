"""Samples texts from a RADD model and prints each, followed by a line of 92 equals signs.

    python -m radd.generate model_path=runs/first num_samples=4 steps=64 output=runs/first/samples.jsonl
    python -m radd.generate model_path=runs/first prefix="The quick" suffix="dog." method=first_hitting show=true
    torchrun --nproc-per-node 2 -m radd.generate model_path=runs/first num_samples=64 output=samples.jsonl

The texts do not depend on the batch size or the number of processes. Options: ``--help``.
"""

import sys

from common.cli import run
from common.generation.sample_file import texts
from common.parallel import start
from radd.generation import GenerateConfig, generate


def main(config: GenerateConfig) -> None:
    with start("ddp") as parallel:
        generation = generate(config, parallel)
        if parallel.is_main:
            sys.stdout.write(texts(generation.records))
            sys.stdout.flush()
            print(generation.summary(), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run(main, "generate", GenerateConfig))
