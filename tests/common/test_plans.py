"""Every plan on two gloo processes trains as one process does, really shards, and resumes bit for bit."""

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from common.checkpoint import find_checkpoint, list_checkpoints, load_weights, step_of
from common.errors import CheckpointError
from common.optim import decay_groups
from common.testing.distributed import run_torchrun
from common.testing.tiny_task import TinyModel, TinyTask, TinyValidation, tiny_config, tiny_loader
from common.tracking import read_records
from common.trainer import TrainState, fit

WORKER = Path(__file__).with_name("plan_worker.py")
PLANS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
TIMING = ("throughput", "memory", "time")


def numbers(run_dir: Path, skip: tuple[str, ...] = TIMING) -> list[dict]:
    return [{k: v for k, v in r.items() if k.split("/")[0] not in skip} for r in read_records(run_dir)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All plans in one start, because importing torch and DeepSpeed is the slow part; shared by pytest's workers."""
    shared = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if shared else base) / "plans"
    out.mkdir(exist_ok=True)
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "done").exists():
            train_all(out)
            (out / "done").touch()
    return out


def train_all(out: Path) -> None:
    run_torchrun(WORKER, 2, [out, *PLANS], timeout=240)
    config = tiny_config(out / "one", validate_interval_steps=3, log_interval_steps=2, nonfinite="skip")
    fit(
        TinyTask(poison_step=4), config, train_loader=tiny_loader(config),
        validation_loader=TinyValidation(num_batches=3),
    )  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("variant", ["whole", "recomputed"])
@pytest.mark.parametrize("ema", [True, False])
def test_two_processes_train_as_one_does(runs: Path, plan: str, variant: str, ema: bool):
    expected, _ = load_weights(runs / "one", ema=ema)
    got, _ = load_weights(runs / plan / variant, ema=ema)
    assert set(got) == set(expected) == set(TinyModel().state_dict())
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6, msg=f"{plan} {variant} {name}")


@pytest.mark.parametrize("plan", PLANS)
def test_metrics_do_not_depend_on_the_number_of_processes(runs: Path, plan: str):
    expected = numbers(runs / "one", (*TIMING, "hook"))
    got = numbers(runs / plan / "whole", (*TIMING, "hook"))
    assert [r["step"] for r in got] == [r["step"] for r in expected]
    for have, want in zip(got, expected, strict=True):
        assert {k: v for k, v in have.items() if v is not None} == pytest.approx(
            {k: v for k, v in want.items() if v is not None}, rel=1e-5
        )


@pytest.mark.parametrize("plan", PLANS)
def test_shards_are_as_small_as_promised(runs: Path, plan: str):
    total = sum(p.numel() for p in TinyModel().parameters())
    ranks = json.loads((runs / plan / "sizes.json").read_text())
    held = {kind: [rank[kind] for rank in ranks] for kind in ("parameters", "optimizer")}
    padding = 16  # shards are padded to equal lengths
    if plan in ("fsdp2", "zero3"):
        assert all(n <= total / 2 + padding for n in held["parameters"])
        assert total <= sum(held["parameters"]) <= total + 2 * padding
    else:
        assert held["parameters"] == [total, total]
    if plan == "ddp":
        assert held["optimizer"] == [2 * total, 2 * total]  # two moments, whole on every rank
    else:
        assert all(n <= total + 2 * padding for n in held["optimizer"])
        assert 2 * total <= sum(held["optimizer"]) <= 2 * total + 4 * padding


@pytest.mark.parametrize("plan", PLANS)
def test_stopped_and_resumed_run_equals_undisturbed_run(runs: Path, plan: str):
    for ema in (True, False):
        whole, _ = load_weights(runs / plan / "dropout", ema=ema)
        cut, _ = load_weights(runs / plan / "cut", ema=ema)
        for name in whole:
            assert torch.equal(whole[name], cut[name]), (plan, ema, name)
    assert numbers(runs / plan / "cut") == numbers(runs / plan / "dropout")


@pytest.mark.parametrize("plan", PLANS)
def test_skipped_step_is_reported_with_its_rows(runs: Path, plan: str):
    kept = sorted((runs / plan / "whole" / "nonfinite").glob("step_00000005_rank_*.json"))
    assert kept
    assert numbers(runs / plan / "whole")[-1]["train/skipped_steps"] == 1


@pytest.mark.parametrize("plan", PLANS)
def test_full_disk_of_one_rank_leaves_the_earlier_checkpoint(runs: Path, plan: str):
    found = find_checkpoint(runs / plan / "full")
    assert found is not None
    assert step_of(found) == 2
    assert [f.name for f in (runs / plan / "full" / "checkpoints").iterdir()] == [found.name]


def continue_alone(source: Path, target: Path, plan: str) -> Path:
    """Copies a two-process run as it was at step 4 and finishes it on one process."""
    shutil.copytree(source, target)
    shutil.rmtree(list_checkpoints(target)[-1])
    config = tiny_config(target, plan=plan, validate_interval_steps=3, log_interval_steps=2, nonfinite="skip")
    fit(
        TinyTask(poison_step=4), config, train_loader=tiny_loader(config),
        validation_loader=TinyValidation(num_batches=3),
    )  # fmt: skip
    return target


@pytest.mark.parametrize(
    "saved_by, continued_by", [("ddp", "none"), ("fsdp2", "none"), ("ddp", "fsdp2"), ("fsdp2", "fsdp2")]
)
def test_run_continues_on_another_number_of_processes(runs: Path, tmp_path: Path, saved_by: str, continued_by: str):
    target = continue_alone(runs / saved_by / "whole", tmp_path / "run", continued_by)
    for ema in (True, False):
        expected, _ = load_weights(runs / "one", ema=ema)
        got, _ = load_weights(target, ema=ema)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)
    assert numbers(target)[-1]["train/loss"] == pytest.approx(numbers(runs / "one")[-1]["train/loss"], rel=1e-5)


@pytest.mark.parametrize("continued_by", ["none", "fsdp2"])
def test_zero_run_cannot_continue_under_another_plan(runs: Path, tmp_path: Path, continued_by: str):
    with pytest.raises(CheckpointError, match="resume with parallel=zero2"):
        continue_alone(runs / "zero2" / "whole", tmp_path / "run", continued_by)


def test_zero_run_cannot_continue_on_another_number_of_processes(runs: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="world_size 2, not 1.*on 2 processes"):
        continue_alone(runs / "zero1" / "whole", tmp_path / "run", "zero1")


class OddModel(TinyModel):
    """Tied and frozen parameters beside the usual ones."""

    def __init__(self) -> None:
        super().__init__()
        self.turn, self.back = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.back.weight = self.turn.weight
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return super().forward(self.back(self.turn(x_BD) + self.frozen))


class OddTask(TinyTask):
    def build_model(self) -> nn.Module:
        return OddModel()

    def param_groups(self, model: nn.Module, weight_decay: float) -> list[dict]:
        return decay_groups(model, weight_decay)


class Crash(Exception):
    every_steps = 3

    def __call__(self, state: TrainState) -> None:
        raise self


def train_odd(run_dir: Path, plan: str, *hooks: Crash) -> None:
    config = tiny_config(run_dir, plan=plan)
    fit(OddTask(), config, train_loader=tiny_loader(config), hooks=hooks)


@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan != "ddp"])
def test_tied_frozen_and_grouped_parameters_train_and_resume_under_every_plan(tmp_path: Path, plan: str):
    train_odd(tmp_path / "one", "none")
    with pytest.raises(Crash):
        train_odd(tmp_path / plan, plan, Crash())
    train_odd(tmp_path / plan, plan)
    for ema in (True, False):
        expected, _ = load_weights(tmp_path / "one", ema=ema)
        got, _ = load_weights(tmp_path / plan, ema=ema)
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)
