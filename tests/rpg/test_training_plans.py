"""Training on two processes equals training on one, batch statistics and generated networks included."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.checkpoint import load_weights
from common.testing.distributed import run_torchrun
from common.tracking import read_records
from tests.rpg.tiny_run import plain_folder
from tests.rpg.training_worker import train

PLANS = ("ddp", "fsdp2", "zero2")


def test_two_processes_train_and_draw_the_same_as_one(tmp_path: Path, repo_root: Path):
    """One test, so that the runs of two processes are started once, whatever worker gets it."""
    folder = plain_folder(tmp_path / "checkpoints")
    train(tmp_path, folder, "none")
    run_torchrun(repo_root / "tests/rpg/training_worker.py", 2, [tmp_path, folder, *PLANS])
    expected = read_records(tmp_path / "none")
    for plan in PLANS:
        found = read_records(tmp_path / plan)
        for name in ("train/loss", "train/grad_norm"):
            values = [[record[name] for record in records] for records in (expected, found)]
            assert values[1] == pytest.approx(values[0], rel=1e-5), f"{plan} {name}"
        for ema in (False, True):
            wanted, weights = (load_weights(tmp_path / run, ema=ema)[0] for run in ("none", plan))
            for name, tensor in wanted.items():
                torch.testing.assert_close(weights[name], tensor, rtol=0, atol=3e-5, msg=f"{plan} ema={ema} {name}")
        for step in (2, 4):
            drawn = [load_file(tmp_path / run / "generated" / f"step_{step}.safetensors") for run in ("none", plan)]
            for name, tensor in drawn[0].items():
                torch.testing.assert_close(drawn[1][name], tensor, rtol=1e-3, atol=1e-3, msg=f"{plan} {step} {name}")
