"""Run by torchrun in test_plans.py: trains the tiny task under several plans in one start, with and without a break.

    torchrun --nproc-per-node=2 tests/common/plan_worker.py OUT PLAN...

For each plan: ``OUT/PLAN/whole`` is an undisturbed run without dropout, ``recomputed`` the same with activation
checkpointing; ``dropout`` is an undisturbed run with dropout, ``cut`` the same stopped at step 4 and continued; in
``full`` the disk of one rank fills up at step 4. The main process writes ``OUT/PLAN/sizes.json``: what each rank held.
"""

import contextlib
import errno
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.errors import CheckpointError
from common.parallel import start
from common.plans import Plan
from common.testing.distributed import finish
from common.testing.tiny_task import TinyTask, TinyValidation, tiny_config, tiny_loader
from common.trainer import FitResult, TrainState, fit


class Inspector:
    """Records how much this rank holds, and that ``eval_model`` gives every rank a whole model."""

    every_steps = 2

    def __init__(self) -> None:
        self.sizes: list[dict] = []

    def __call__(self, state: TrainState) -> dict[str, float]:
        plan: Plan = state._run.plan
        self.sizes.append(plan.local_sizes | {"rank": state.parallel.rank})
        batch = next(iter(TinyValidation().batches(0, 1)))[1]
        with state.eval_model() as model:
            value = float(model(batch["x"]).sum()) if state.is_main else 0.0  # one rank alone: must not hang
        return {"hook/output": value}


class SignalAt:
    """Sends SIGTERM to the last rank only; the others must learn of it."""

    def __init__(self, step: int) -> None:
        self.every_steps = step

    def __call__(self, state: TrainState) -> None:
        if state.parallel.rank == state.parallel.world_size - 1 and state.step == self.every_steps:
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def full_disk(rank: int, last_intact_step: int) -> Iterator[None]:
    """The disk of the last rank has no room for its own state after ``last_intact_step``."""
    save = torch.save

    def save_or_fail(value: object, target: object) -> None:
        if rank == 1 and isinstance(target, Path) and f"step_{last_intact_step:08d}" not in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(value, target)

    torch.save = save_or_fail
    try:
        yield
    finally:
        torch.save = save


def train(run_dir: Path, plan: str, hooks: list, *, dropout: float = 0.0, recompute: bool = False) -> FitResult:
    config = tiny_config(
        run_dir, plan=plan, validate_interval_steps=3, log_interval_steps=2, nonfinite="skip",
        parallel={"activation_checkpointing": recompute},
    )  # fmt: skip
    with start(plan) as parallel:
        loader = tiny_loader(config, parallel.rank, parallel.world_size)
        task = TinyTask(dropout=dropout, poison_step=4)
        return fit(task, config, train_loader=loader, validation_loader=TinyValidation(num_batches=3), hooks=hooks)


def main(out: Path, plans: list[str]) -> None:
    for plan in plans:
        inspector, folder = Inspector(), out / plan
        assert train(folder / "whole", plan, [inspector]).step == 6
        with start(plan) as parallel:
            sizes = parallel.gather(inspector.sizes[-1])
            if parallel.is_main:
                (folder / "sizes.json").write_text(json.dumps(sizes))
        train(folder / "recomputed", plan, [Inspector()], recompute=True)
        train(folder / "dropout", plan, [Inspector()], dropout=0.3, recompute=True)
        result = train(folder / "cut", plan, [Inspector(), SignalAt(3)], dropout=0.3, recompute=True)
        assert result.stopped_early
        assert result.step == 4, result
        assert parallel.rank or (folder / "cut" / "REQUEUE").is_file()
        result = train(folder / "cut", plan, [Inspector()], dropout=0.3, recompute=True)
        assert not result.stopped_early
        assert result.step == 6, result
        assert not (folder / "cut" / "REQUEUE").exists()
        noticed = pytest.raises(CheckpointError, match="rank 1: No space left on device")
        with full_disk(parallel.rank, last_intact_step=2), noticed:
            train(folder / "full", plan, [])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    finish()
