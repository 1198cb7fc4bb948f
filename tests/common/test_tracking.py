"""metrics.jsonl is the record of a run: complete after a kill, without gaps or doubles after a resume."""

import json
import math
import sys
import types
from pathlib import Path

import pytest

from common.config import TrackingConfig
from common.errors import ConfigError
from common.tracking import METRICS_FILE, Tracker, read_records


def steps(run_dir: Path) -> list[int]:
    return [record["step"] for record in read_records(run_dir)]


def test_resumed_record_has_neither_gaps_nor_doubles(tmp_path: Path):
    first = Tracker(tmp_path, TrackingConfig())
    for step in (10, 20, 30, 35):
        first.log(step, {"train/loss": 1.0 / step})
    first.close()

    again = Tracker(tmp_path, TrackingConfig())
    again.resume_at(20)
    for step in (30, 40):
        again.log(step, {"train/loss": 1.0 / step})
    again.close()

    assert steps(tmp_path) == [10, 20, 30, 40]
    assert read_records(tmp_path)[2]["train/loss"] == 1 / 30


def test_a_line_that_a_kill_cut_off_is_dropped_and_the_next_record_starts_a_line(tmp_path: Path):
    (tmp_path / METRICS_FILE).write_text('{"step": 10, "time": 1.0}\n{"step": 20, "ti')
    tracker = Tracker(tmp_path, TrackingConfig())
    tracker.resume_at(20)
    tracker.log(20, {"train/loss": 2.0})
    tracker.close()
    assert [json.loads(line)["step"] for line in (tmp_path / METRICS_FILE).read_text().splitlines()] == [10, 20]


def test_resuming_from_the_start_empties_the_record(tmp_path: Path):
    (tmp_path / METRICS_FILE).write_text('{"step": 10}\n')
    Tracker(tmp_path, TrackingConfig()).resume_at(0)
    assert (tmp_path / METRICS_FILE).read_text() == ""


def test_records_are_valid_json_even_when_values_are_not_finite(tmp_path: Path):
    tracker = Tracker(tmp_path, TrackingConfig())
    tracker.log(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": 0.1})
    tracker.close()

    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    record = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=refuse)
    assert (record["train/loss"], record["train/grad_norm"], record["train/lr"]) == (None, None, 0.1)


def test_a_record_is_readable_before_the_tracker_is_closed(tmp_path: Path):
    tracker = Tracker(tmp_path, TrackingConfig())
    tracker.log(1, {"train/loss": 3.0})
    assert steps(tmp_path) == [1]
    tracker.close()


def test_other_processes_write_nothing(tmp_path: Path):
    tracker = Tracker(tmp_path / "run", TrackingConfig(tensorboard=True), is_main=False)
    tracker.resume_at(0)
    tracker.log(1, {"train/loss": 3.0})
    tracker.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package,options", [("tensorboard", {"tensorboard": True}), ("wandb", {"wandb": "offline"})])
def test_a_missing_package_is_named_with_its_switch(tmp_path: Path, monkeypatch, package: str, options: dict):
    monkeypatch.setattr("common.tracking.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"pip install {package}.*tracking\.{package}="):
        Tracker(tmp_path, TrackingConfig(**options))


def test_tensorboard_shows_the_records(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker(tmp_path, TrackingConfig(tensorboard=True))
    tracker.log(3, {"train/loss": 1.5})
    tracker.log(6, {"train/loss": 1.25})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(3, 1.5), (6, 1.25)]


def test_wandb_keeps_its_run_id_over_restarts(tmp_path: Path, monkeypatch):
    started, logged = [], []

    class Run:
        def define_metric(self, *names, **options) -> None:
            assert options == {"step_metric": "step"}

        def log(self, values: dict) -> None:
            logged.append(values)

        def finish(self) -> None:
            logged.append("finished")

    def init(**options):
        started.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setattr("common.tracking.check_packages", lambda config: None)
    (tmp_path / "config.json").write_text('{"seed": 3}')
    for step in (1, 2):
        tracker = Tracker(tmp_path, TrackingConfig(wandb="offline", project="quintet", run_name="first"))
        tracker.log(step, {"train/loss": 2.0})
        tracker.close()
    assert logged == [{"train/loss": 2.0, "step": 1}, "finished", {"train/loss": 2.0, "step": 2}, "finished"]
    assert started[0] == started[1]
    assert started[0]["mode"] == "offline"
    assert started[0]["config"] == {"seed": 3}
    assert started[0]["id"]
