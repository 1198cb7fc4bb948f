"""Adapting on two processes equals adapting on one, whatever the parallel plan, the head's tying and the adapters."""

import pytest
import torch

from common.checkpoint import load_weights
from common.testing.distributed import run_torchrun
from common.tracking import read_records
from tests.diffullama.training_worker import STEPS, train

CASES = ("gpt2:ddp", "gpt2:fsdp2", "gpt2+lora:fsdp2", "llama:fsdp2", "gpt2:zero2", "gpt2:zero3", "llama:zero3")


def test_two_processes_train_the_same_model_as_one_under_every_plan(tmp_path, repo_root):
    # one test, because several workers of pytest-xdist would each start all the runs
    for family in sorted({case.split(":")[0] for case in CASES}):
        train(tmp_path / f"{family}-none", family, "none")
    run_torchrun(repo_root / "tests/diffullama/training_worker.py", 2, [tmp_path, *CASES])
    for case in CASES:
        family, plan = case.split(":")
        one, two = tmp_path / f"{family}-none", tmp_path / f"{family}-{plan}"
        check_records(case, read_records(one), read_records(two))
        for ema in (False, True):
            expected, weights = (load_weights(run, ema=ema)[0] for run in (one, two))
            assert weights.keys() == expected.keys(), case
            for name, tensor in expected.items():
                torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5, msg=f"{case} ema={ema} {name}")


def check_records(case: str, expected: list[dict], found: list[dict]) -> None:
    """Losses, norms and ratios of every step, and what one process alone computed with the whole model."""
    assert len(expected) == STEPS
    for name in ("train/loss", "train/masked_nll", "train/anneal_ratio", "train/grad_norm"):
        values = [record[name] for record in expected]
        assert [record[name] for record in found] == pytest.approx(values, rel=1e-5), f"{case} {name}"
    alone = [[record["hook/logits"] for record in run if "hook/logits" in record] for run in (expected, found)]
    assert len(alone[1]) == STEPS // 2, case
    assert alone[1] == pytest.approx(alone[0], rel=1e-5), case
