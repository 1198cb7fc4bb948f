"""Run by torchrun (or alone) in test_training_plans.py: adapts tiny models under several plans.

    torchrun --nproc-per-node=2 tests/diffullama/training_worker.py OUT FAMILY:PLAN...

A family is gpt2 (tied head), llama (untied), or one of these with ``+lora``. The run of each case is
``OUT/FAMILY-PLAN``. Two processes, or one with two accumulated micro-batches, see the same micro-batches. The attention
is still opening in the first steps; in the second one nothing is masked in the first half of the rows, all that the
first process has.
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
from diffullama.config import ObjectiveConfig
from diffullama.lora import PeftConfig, apply_lora
from diffullama.model import DiffusionLM
from diffullama.task import AdaptationTask
from tests.diffullama.tiny_models import VOCAB, tiny_lm

ROWS, LENGTH, STEPS = 8, 12, 4


class UnevenTask(AdaptationTask):
    """In the second step nothing is masked in the first half of the rows."""

    def draw(self, step: int, size: int) -> dict[str, Tensor]:
        draws = super().draw(step, size)
        if step == 1:
            draws["u"][: size // 2] = 1.0
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
            x_BL = torch.randint(0, VOCAB - 1, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
            yield {"tokens": x_BL.chunk(2)[self.halves[index]]}

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]

    def seek(self, step: int) -> None:
        self.position = step * len(self.halves)


class WholeModel:
    """A hook in which one rank alone runs the model, as sampling a snapshot does: it must not hang."""

    every_steps = 2

    def __call__(self, state: TrainState) -> dict[str, float]:
        x_BL = torch.arange(LENGTH)[None]
        with state.eval_model() as model:
            logits = model(x_BL) if state.is_main else None
        return {"hook/logits": float(logits.double().square().sum()) if state.is_main else 0.0}


def build(family: str) -> DiffusionLM:
    """The tiny model, with adapters if asked for."""
    name, _, adapters = family.partition("+")
    model = tiny_lm(name)
    if adapters:
        torch.manual_seed(0)
        model = apply_lora(model, PeftConfig(kind="lora", r=2, modules_to_save=["embed_tokens"]))
    return model.train()


def train(run_dir: Path, family: str, plan: str) -> None:
    with start(plan) as parallel:
        task = UnevenTask(lambda: build(family), ObjectiveConfig(anneal_steps=3), seed=0, length=LENGTH)
        config = TrainerConfig(
            run_dir=str(run_dir),
            total_steps=STEPS,
            batch=BatchConfig(global_size=ROWS, micro_size=ROWS // 2),
            # eps: GPT-2's key bias has no gradient but rounding errors, which Adam would turn into whole steps
            optim=OptimConfig(lr=1e-2, warmup=0, weight_decay=0.1, eps=1e-4),
            parallel=ParallelConfig(plan=plan),
            checkpoint=CheckpointConfig(interval_steps=STEPS),
            tracking=TrackingConfig(progress=False),
            precision="fp32",
            ema_decay=0.5,
            log_interval_steps=1,
        )
        loader = HalfBatches(parallel.rank, parallel.world_size)
        fit(task, config, train_loader=loader, hooks=[WholeModel()])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[2:]:
        family, plan = case.split(":")
        train(Path(sys.argv[1]) / f"{family}-{plan}", family, plan)
    finish()
