"""Run by torchrun in test_finetuning.py: trains from two starts under several plans.

torchrun --nproc-per-node=2 tests/logah/finetune_worker.py OUT HYPERNETWORK PLAN...
"""

import sys
from pathlib import Path

import torch

from common.testing.distributed import finish
from logah.finetuning import finetune
from tests.logah.tiny_finetune import finetune_config


def train(out: Path, plan: str, hypernetwork: str) -> None:
    """A comparison in ``out/PLAN`` with mixed images and two forward passes per step and process, or four of one."""
    inits = ["random", f"logah@hypernetwork:{hypernetwork}"]
    training = {"accum": 2, "mixup": 0.5, "cutmix": 1.0, "export": False}
    finetune(finetune_config(out / plan, inits=inits, plan=plan, training=training))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for plan in sys.argv[3:]:
        train(Path(sys.argv[1]), plan, sys.argv[2])
    finish()
