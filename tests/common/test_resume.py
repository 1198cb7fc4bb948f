"""The same command again continues bit for bit, whatever ended the run before."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.checkpoint import find_checkpoint, list_checkpoints, load_weights, step_of
from common.config import CheckpointConfig, OptimConfig
from common.errors import CheckpointError
from common.resume import config_changes
from common.testing.distributed import ROOT, child_environment
from common.testing.tiny_task import TinyTask, TinyValidation, tiny_config, tiny_loader
from common.tracking import read_records
from common.trainer import FitResult, fit

WORKER = Path(__file__).with_name("kill_worker.py")


def train(run_dir: Path, *, hooks: tuple = (), task: TinyTask | None = None, run_config=None, **changes) -> FitResult:
    config = tiny_config(run_dir, validate_interval_steps=3, total_steps=8, **changes)
    return fit(
        task or TinyTask(dropout=0.2), config, train_loader=tiny_loader(config), validation_loader=TinyValidation(),
        hooks=hooks, run_config=run_config,
    )  # fmt: skip


def numbers(run_dir: Path) -> list[dict]:
    return [
        {k: v for k, v in r.items() if not k.startswith(("throughput", "memory", "time"))}
        for r in read_records(run_dir)
    ]


def assert_same_run(got: Path, expected: Path) -> None:
    for ema in (True, False):
        left, right = load_weights(got, ema=ema)[0], load_weights(expected, ema=ema)[0]
        for name in right:
            assert torch.equal(left[name], right[name]), (name, ema)
    assert numbers(got) == numbers(expected)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train(run_dir)
    return run_dir


class SignalAt:
    def __init__(self, step: int, number: signal.Signals) -> None:
        self.every_steps, self.number, self.fired = step, number, False

    def __call__(self, state) -> None:
        if not self.fired:
            self.fired = True
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_saves_and_asks_for_a_requeue_and_the_rest_is_the_same(tmp_path: Path, undisturbed: Path, number):
    result = train(tmp_path / "run", hooks=(SignalAt(4, number),))
    assert result.stopped_early
    assert result.step == 5  # the step that was running is finished
    assert json.loads((tmp_path / "run" / "REQUEUE").read_text()) == {"step": 5, "signal": number.name}
    assert step_of(find_checkpoint(tmp_path / "run")) == 5
    result = train(tmp_path / "run")
    assert not result.stopped_early
    assert not (tmp_path / "run" / "REQUEUE").exists()
    assert_same_run(tmp_path / "run", undisturbed)


def test_kills_at_any_moment_change_nothing(tmp_path: Path, undisturbed: Path):
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path / "run"), "1", "12"], cwd=ROOT, env=child_environment(),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert sum(json.loads(done.stdout.splitlines()[-1])) >= 6, "too few of the children were killed to show anything"
    assert_same_run(tmp_path / "run", undisturbed)
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp*"))


class Crash(Exception):
    pass


class CrashAt:
    def __init__(self, step: int) -> None:
        self.every_steps = step

    def __call__(self, state) -> None:
        raise Crash


@pytest.mark.parametrize("step", [1, 3, 7])
def test_crash_between_checkpoints_repeats_the_lost_steps(tmp_path: Path, undisturbed: Path, step: int):
    with pytest.raises(Crash):
        train(tmp_path / "run", hooks=(CrashAt(step),))
    train(tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)


def test_damaged_newest_checkpoint_costs_one_interval_only(tmp_path: Path, undisturbed: Path, caplog):
    with pytest.raises(Crash):
        train(tmp_path / "run", hooks=(CrashAt(5),))
    newest = list_checkpoints(tmp_path / "run")[-1]
    assert step_of(newest) == 4
    (newest / "rank_00000.pt").write_bytes(b"")
    train(tmp_path / "run")
    assert str(newest / "rank_00000.pt") in caplog.text
    assert_same_run(tmp_path / "run", undisturbed)


def test_finished_run_trains_nothing_and_says_so(tmp_path: Path, undisturbed: Path, caplog):
    shutil.copytree(undisturbed, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    result = train(tmp_path / "run", task=None)
    assert result.step == 8
    assert "nothing left to train" in caplog.text
    assert result.metrics["train/loss"] == numbers(undisturbed)[-1]["train/loss"]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_fp16_loss_scale_and_average_survive(tmp_path: Path):
    train(tmp_path / "whole", precision="fp16")
    with pytest.raises(Crash):
        train(tmp_path / "cut", precision="fp16", hooks=(CrashAt(5),))
    train(tmp_path / "cut", precision="fp16")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_changed_configuration_is_refused_with_the_difference(tmp_path: Path):
    with pytest.raises(Crash):
        train(tmp_path / "run", hooks=(CrashAt(3),))
    changed = OptimConfig(lr=5e-3, warmup=3, grad_clip=0.5, weight_decay=0.1, schedule="cosine")
    with pytest.raises(CheckpointError, match=r"optim\.lr: 0\.01 -> 0\.005.*allow_config_change=true"):
        train(tmp_path / "run", optim=changed)
    assert train(tmp_path / "run", optim=changed, allow_config_change=True).step == 8


def test_options_that_cannot_change_results_may_change(tmp_path: Path, undisturbed: Path):
    with pytest.raises(Crash):
        train(tmp_path / "run", hooks=(CrashAt(3),))
    train(
        tmp_path / "run", checkpoint=CheckpointConfig(interval_steps=5),
        parallel={"activation_checkpointing": True},
    )  # fmt: skip
    assert_same_run(tmp_path / "run", undisturbed)


def test_config_difference_names_dotted_keys_once():
    before = {"model": {"width": 8, "gone": 1}, "seed": 0, "run_dir": "a", "training": {"log_freq": 5}}
    now = {"model": {"width": 9, "new": None}, "seed": 0, "run_dir": "b", "training": {"log_freq": 6}}
    assert config_changes(before, now) == [
        "model.width: 8 -> 9", "model.gone: 1 -> '(not set)'", "model.new: '(not set)' -> None"
    ]  # fmt: skip


def test_run_config_given_by_the_entry_point_is_what_is_compared(tmp_path: Path):
    with pytest.raises(Crash):
        train(tmp_path / "run", hooks=(CrashAt(3),), run_config={"model": {"width": 8}})
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"model": {"width": 8}}
    with pytest.raises(CheckpointError, match=r"model\.width: 8 -> 9"):
        train(tmp_path / "run", run_config={"model": {"width": 9}})
    assert load_weights(tmp_path / "run")[1] == {"model": {"width": 8}}


def test_checkpoint_of_another_model_size_names_the_parameter(tmp_path: Path):
    run_config = {"same": True}
    with pytest.raises(Crash):
        train(tmp_path / "run", hooks=(CrashAt(3),), run_config=run_config)

    class OneBlock(TinyTask):
        def build_model(self):
            model = super().build_model()
            model.head = torch.nn.Linear(8, 4)
            return model

    with pytest.raises(CheckpointError, match=r"head.* has shape \(3,( 8)?\)"):
        train(tmp_path / "run", task=OneBlock(), run_config=run_config)


def test_run_without_average_cannot_continue_with_one(tmp_path: Path):
    with pytest.raises(Crash):
        train(tmp_path / "run", hooks=(CrashAt(3),), ema_decay=None)
    with pytest.raises(CheckpointError, match="without a moving average"):
        train(tmp_path / "run", allow_config_change=True)


def test_run_dir_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="run_dir=.*cannot be used"):
        train(tmp_path / "run")
