"""Run by torchrun in test_training_plans.py: trains tiny hypernetworks under several plans.

torchrun --nproc-per-node=2 tests/logah/training_worker.py OUT PLAN...
"""

import sys
from pathlib import Path

import torch

from common.parallel import start
from common.testing.distributed import finish
from logah.training import run_training
from tests.logah.tiny_training import run_config


def train(out: Path, plan: str) -> None:
    """A run in ``out/PLAN`` with tests of networks after every epoch and averaged weights."""
    with start(plan):
        run_training(run_config(out / plan, plan=plan, training={"valid_epoch": 1, "ema": True, "ema_rate": 0.5}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for plan in sys.argv[2:]:
        train(Path(sys.argv[1]), plan)
    finish()
