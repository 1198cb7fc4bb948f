"""Training a muP network on two processes equals training on one, under every plan; resumed runs equal whole ones."""

import pytest
import torch

from common.checkpoint import load_weights
from common.testing.distributed import run_torchrun
from common.tracking import read_records
from tests.mup_dit.training_worker import STEPS, train

CASES = ("dit:ddp", "dit:fsdp2", "dit:zero2", "dit:zero3", "pixart:fsdp2", "mmdit:ddp", "mmdit:fsdp2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, repo_root):
    """A folder with the run of every case, and of every family on one process."""
    folder = tmp_path_factory.mktemp("plans")
    for family in sorted({case.split(":")[0] for case in CASES}):
        train(folder / f"{family}-none", family, "none")
    run_torchrun(repo_root / "tests/mup_dit/training_worker.py", 2, [folder, *CASES])
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_the_same_network_as_one(runs, case):
    family, plan = case.split(":")
    one, two = runs / f"{family}-none", runs / f"{family}-{plan}"
    records = read_records(one)
    assert len(records) == STEPS
    for name in ("train/loss", "train/mse", "train/grad_norm"):
        found = [record[name] for record in read_records(two)]
        assert found == pytest.approx([record[name] for record in records], rel=1e-5), name
    for ema in (False, True):
        expected, weights = (load_weights(run, ema=ema)[0] for run in (one, two))
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=2e-5, msg=f"{case} ema={ema} {name}")


@pytest.mark.parametrize("case", CASES)
def test_one_process_alone_may_run_the_whole_network(runs, case):
    family, plan = case.split(":")
    expected, found = (
        [record["hook/output"] for record in read_records(runs / f"{family}-{name}") if "hook/output" in record]
        for name in ("none", plan)
    )
    assert len(found) == STEPS // 2
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", ["dit", "mmdit"])
def test_resumed_run_equals_a_whole_one_bit_for_bit(runs, tmp_path, family):
    train(tmp_path / "cut", family, "none", steps=2)
    train(tmp_path / "cut", family, "none")
    for ema in (False, True):
        expected, found = (load_weights(run, ema=ema)[0] for run in (runs / f"{family}-none", tmp_path / "cut"))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
