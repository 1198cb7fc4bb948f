"""Run by torchrun in test_training_plans.py: trains tiny generators under several plans.

torchrun --nproc-per-node=2 tests/rpg/training_worker.py OUT CHECKPOINTS PLAN...
"""

import sys
from pathlib import Path

import torch

from common.parallel import start
from common.testing.distributed import finish
from rpg.training import run_training
from tests.rpg.tiny_run import run_config


def train(out: Path, checkpoints: Path, plan: str) -> None:
    """A run in ``out/PLAN`` that also draws networks."""
    with start(plan):
        run_training(run_config(out / plan, checkpoints, plan=plan, training={"sample_freq": 2}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for plan in sys.argv[3:]:
        train(Path(sys.argv[1]), Path(sys.argv[2]), plan)
    finish()
