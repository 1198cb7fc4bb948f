"""Training on two processes equals training on one: each process has networks of its own of the meta-batch."""

from pathlib import Path

import pytest
import torch

from common.checkpoint import load_weights
from common.testing.distributed import run_torchrun
from common.tracking import read_records
from logah.training import prepare
from tests.logah.tiny_training import run_config
from tests.logah.training_worker import train

PLANS = ("ddp", "fsdp2", "zero2")
WITHOUT_GRADIENT = "proj_e.2.bias"
"""One number per head added to all logits of a softmax: its gradient is rounding, which Adam scales up to a step."""


def test_two_processes_train_as_one(tmp_path: Path, repo_root: Path):
    """One test, so that the runs of two processes are started once, whatever worker gets it."""
    train(tmp_path, "none")
    run_torchrun(repo_root / "tests/logah/training_worker.py", 2, [tmp_path, *PLANS])
    expected = read_records(tmp_path / "none")
    for plan in PLANS:
        found = read_records(tmp_path / plan)
        for name in ("train/loss", "train/grad_norm", "train/top1"):
            values = [[record[name] for record in records] for records in (expected, found)]
            assert values[1] == pytest.approx(values[0], rel=1e-5), f"{plan} {name}"
        assert found[-1]["valid/task_loss"] == pytest.approx(expected[-1]["valid/task_loss"], rel=1e-4), plan
        for ema in (False, True):
            wanted, weights = (load_weights(tmp_path / run, ema=ema)[0] for run in ("none", plan))
            for name, tensor in wanted.items():
                if name.endswith(WITHOUT_GRADIENT):
                    continue
                torch.testing.assert_close(weights[name], tensor, rtol=0, atol=3e-5, msg=f"{plan} ema={ema} {name}")


def test_places_of_a_meta_batch_hold_different_networks(tmp_path: Path):
    """Among several steps, so that chance draws of equal networks do not matter."""
    task = prepare(run_config(tmp_path, nets={"depths": (1, 2, 3), "widths": (8, 12, 16)})).task
    pairs = [[one.key for one in task.source.draw(step)] for step in range(6)]
    assert any(first != second for first, second in pairs)
    assert [[task.source.draw(step, [slot])[0].key for slot in (0, 1)] for step in range(6)] == pairs
