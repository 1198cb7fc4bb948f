"""Run by torchrun (or alone) in test_task.py: trains RADD when the first half of a batch has no masked token at all.

    torchrun --nproc-per-node=2 tests/radd/uneven_worker.py OUT PLAN...

The run of each plan is ``OUT/PLAN``. Two processes, or one with two accumulated micro-batches, see the same rows.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from common.config import OptimConfig, ParallelConfig, TrackingConfig
from common.parallel import start
from common.testing.distributed import finish
from common.trainer import fit
from radd.config import TrainConfig, TrainingConfig
from radd.model import ModelConfig
from radd.task import RADDTask

ROWS, LENGTH, TOKENS, STEPS = 8, 4, 19, 3


class UnevenTask(RADDTask):
    """In the second step nothing is masked in the first half of the rows: all that the first process has."""

    def draw(self, step: int, size: int) -> dict[str, Tensor]:
        draws = super().draw(step, size)
        if step == 1:
            draws["u_mask"][: size // 2] = 1.0
        return draws


class HalfBatches:
    """Random tokens of every step, in two halves: one per process, or one after the other."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.halves = range(rank, 2, world_size)
        self.position = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            step, index = divmod(self.position, len(self.halves))
            self.position += 1
            x_BL = torch.randint(0, TOKENS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
            yield {"tokens": x_BL.chunk(2)[self.halves[index]]}

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]

    def seek(self, step: int) -> None:
        self.position = step * len(self.halves)


def train(run_dir: Path, plan: str) -> None:
    with start(plan) as parallel:
        config = TrainConfig(
            run_dir=str(run_dir),
            tokens=TOKENS,
            precision="fp32",
            model=ModelConfig(hidden_size=32, n_blocks=2, n_heads=4, length=LENGTH, dropout=0.0),
            parallel=ParallelConfig(plan=plan),
            optim=OptimConfig(warmup=0, lr=1e-2),
            tracking=TrackingConfig(progress=False),
            training=TrainingConfig(
                batch_size=ROWS,
                accum=2 // parallel.world_size,
                n_iters=STEPS,
                log_freq=1,
                eval_freq=0,
                loss_type="lambda_DCE",
            ),
        )
        loader = HalfBatches(parallel.rank, parallel.world_size)
        fit(UnevenTask(config), config.trainer_config(parallel.world_size), train_loader=loader)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        train(Path(sys.argv[1]) / name, name)
    finish()
