"""Run by torchrun (or alone) in test_training_plans.py: trains tiny networks under several plans.

    torchrun --nproc-per-node=2 tests/mup_dit/training_worker.py OUT FAMILY:PLAN...

The run of each case is ``OUT/FAMILY-PLAN``. Two processes, or one with two accumulated micro-batches, see the same
micro-batches. The networks are twice as wide as the base, so that every multiplier of muP counts.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from common.config import BatchConfig, CheckpointConfig, OptimConfig, ParallelConfig, TrackingConfig, TrainerConfig
from common.parallel import start
from common.testing.distributed import finish
from common.trainer import TrainState, fit
from mup_dit.objective import ObjectiveConfig
from mup_dit.task import DiffusionTask
from tests.mup_dit.tiny import inputs, model, model_config

ROWS, STEPS, HEADS = 8, 4, 8


class HalfBatches:
    """Random latents and conditions of every step, in two halves: one per process, or one after the other."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.halves = range(rank, 2, world_size)
        self.position = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            step, index = divmod(self.position, len(self.halves))
            self.position += 1
            rng = torch.Generator().manual_seed(step)
            batch = {
                "mean": torch.randn(ROWS, 4, 8, 8, generator=rng),
                "std": torch.rand(ROWS, 4, 8, 8, generator=rng),
                "label": torch.randint(10, (ROWS,), generator=rng),
                "caption": torch.randn(ROWS, 1, 6, 20, generator=rng),
                "mask": (torch.arange(6) < torch.randint(1, 7, (ROWS, 1), generator=rng)).long(),
                "pooled": torch.randn(ROWS, 12, generator=rng),
            }
            yield {name: value.chunk(2)[self.halves[index]] for name, value in batch.items()}

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]

    def seek(self, step: int) -> None:
        self.position = step * len(self.halves)


class WholeModel:
    """A hook in which one rank alone runs the network, as a snapshot's sampling does: it must not hang."""

    every_steps = 2

    def __init__(self, family: str) -> None:
        self.family = family

    def __call__(self, state: TrainState) -> dict[str, float]:
        with state.eval_model() as network:
            if not state.is_main:
                return {"hook/output": 0.0}
            return {"hook/output": float(network(*inputs(self.family)).double().square().sum())}


def train(run_dir: Path, family: str, plan: str, steps: int = STEPS) -> None:
    with start(plan) as parallel:
        objective = ObjectiveConfig(kind="flow" if family == "mmdit" else "ddpm", time_sampler="logit_normal")
        task = DiffusionTask(
            model_config(family, HEADS), objective, seed=0, latent_scale=0.5, build=lambda: model(family, HEADS)
        )
        config = TrainerConfig(
            run_dir=str(run_dir),
            total_steps=steps,
            batch=BatchConfig(global_size=ROWS, micro_size=ROWS // 2),
            optim=OptimConfig(lr=1e-2, warmup=0, weight_decay=0.1, eps=1e-4),
            parallel=ParallelConfig(plan=plan),
            checkpoint=CheckpointConfig(interval_steps=2),
            tracking=TrackingConfig(progress=False),
            precision="fp32",
            ema_decay=0.5,
            log_interval_steps=1,
            allow_config_change=True,
        )
        loader = HalfBatches(parallel.rank, parallel.world_size)
        fit(task, config, train_loader=loader, hooks=[WholeModel(family)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[2:]:
        family, plan = case.split(":")
        train(Path(sys.argv[1]) / f"{family}-{plan}", family, plan)
    finish()
