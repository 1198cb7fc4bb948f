"""Training a muP network on two processes equals training on one, under every plan; resumed runs equal whole ones."""

from pathlib import Path

import pytest
import torch

from common.checkpoint import load_weights
from common.testing.distributed import run_torchrun
from common.tracking import read_records
from tests.mup_dit.training_worker import STEPS, train

CASES = ("dit:ddp", "dit:fsdp2", "dit:zero2", "dit:zero3", "pixart:fsdp2", "mmdit:ddp", "mmdit:fsdp2")


def test_two_processes_train_the_same_networks_as_one(tmp_path: Path, repo_root: Path):
    """One test, so that the runs of two processes are started once, whatever worker gets it."""
    for family in sorted({case.split(":")[0] for case in CASES}):
        train(tmp_path / f"{family}-none", family, "none")
    run_torchrun(repo_root / "tests/mup_dit/training_worker.py", 2, [tmp_path, *CASES])
    for case in CASES:
        family, plan = case.split(":")
        one, two = tmp_path / f"{family}-none", tmp_path / f"{family}-{plan}"
        assert_same_records(one, two, case)
        for ema in (False, True):
            expected, weights = (load_weights(run, ema=ema)[0] for run in (one, two))
            assert weights.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(weights[name], tensor, rtol=0, atol=2e-5, msg=f"{case} ema={ema} {name}")


def assert_same_records(one: Path, two: Path, case: str) -> None:
    """Losses and gradients of all steps, and what a hook saw that ran the whole network on one rank alone."""
    expected, found = read_records(one), read_records(two)
    assert len(expected) == len(found) == STEPS
    for name in ("train/loss", "train/mse", "train/grad_norm", "hook/output"):
        values = [[record[name] for record in records if name in record] for records in (expected, found)]
        assert len(values[0]) == (STEPS // 2 if name.startswith("hook") else STEPS)
        assert values[1] == pytest.approx(values[0], rel=1e-4 if name.startswith("hook") else 1e-5), f"{case} {name}"


@pytest.mark.parametrize("family", ["dit", "mmdit"])
def test_resumed_run_equals_a_whole_one_bit_for_bit(tmp_path: Path, family: str):
    train(tmp_path / "whole", family, "none")
    train(tmp_path / "cut", family, "none", steps=2)
    train(tmp_path / "cut", family, "none")
    for ema in (False, True):
        expected, found = (load_weights(tmp_path / run, ema=ema)[0] for run in ("whole", "cut"))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
