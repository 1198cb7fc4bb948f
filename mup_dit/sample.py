"""Samples images from a DiT, PixArt-alpha or MMDiT model into .npz files, webdataset shards or image folders.

    python -m mup_dit.sample model_path=runs/digits num_samples=64 output=runs/digits/samples
    python -m mup_dit.sample model_path=runs/digits sampling.sampler=ddim sampling.steps=50 sampling.cfg_scale=1.5
    torchrun --nproc-per-node 2 -m mup_dit.sample model_path=runs/digits num_samples=50000 batch_size=64

The images do not depend on the number of processes. Options: ``--help``.
"""

import sys

from common.cli import run
from common.parallel import start
from mup_dit.generation import generate
from mup_dit.generation_config import GenerateConfig


def main(config: GenerateConfig) -> None:
    with start("ddp") as parallel:
        generation = generate(config, parallel)
        if parallel.is_main:
            print(generation.summary())


if __name__ == "__main__":
    sys.exit(run(main, "sample", GenerateConfig, "configs/mup_dit"))
