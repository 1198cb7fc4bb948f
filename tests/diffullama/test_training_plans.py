"""Adapting on two processes equals adapting on one, whatever the parallel plan, the head's tying and the adapters."""

import pytest
import torch

from common.checkpoint import load_weights
from common.testing.distributed import run_torchrun
from common.tracking import read_records
from tests.diffullama.training_worker import STEPS, train

CASES = ("gpt2:ddp", "gpt2:fsdp2", "gpt2+lora:fsdp2", "llama:fsdp2", "gpt2:zero2", "gpt2:zero3", "llama:zero3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, repo_root):
    """A folder with the run of every case, and of every family on one process."""
    folder = tmp_path_factory.mktemp("plans")
    for family in sorted({case.split(":")[0] for case in CASES}):
        train(folder / f"{family}-none", family, "none")
    run_torchrun(repo_root / "tests/diffullama/training_worker.py", 2, [folder, *CASES])
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_the_same_model_as_one(runs, case):
    family, plan = case.split(":")
    one, two = runs / f"{family}-none", runs / f"{family}-{plan}"
    records = read_records(one)
    assert len(records) == STEPS
    for name in ("train/loss", "train/masked_nll", "train/anneal_ratio", "train/grad_norm"):
        found = [record[name] for record in read_records(two)]
        assert found == pytest.approx([record[name] for record in records], rel=1e-5), name
    for ema in (False, True):
        expected, weights = (load_weights(run, ema=ema)[0] for run in (one, two))
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5, msg=f"{case} ema={ema} {name}")


@pytest.mark.parametrize("case", CASES)
def test_one_process_alone_may_run_the_whole_model(runs, case):
    family, plan = case.split(":")
    expected, found = (
        [record["hook/logits"] for record in read_records(runs / f"{family}-{name}") if "hook/logits" in record]
        for name in ("none", plan)
    )
    assert len(found) == STEPS // 2
    assert found == pytest.approx(expected, rel=1e-5)
