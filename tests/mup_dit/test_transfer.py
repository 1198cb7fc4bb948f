"""The sweep's command line: runs every width and rate, reports, continues, stops, searches, and refuses."""

import json
import sys
from pathlib import Path

import pytest

from common import cli
from common.errors import ConfigError
from mup_dit import transfer
from mup_dit.arms import LOSS, RESULT
from mup_dit.transfer_config import SweptOptions, TransferConfig

TINY = (
    "model.depth=1",
    "training.n_iters=6",
    "training.log_freq=1",
    "training.batch_size=8",
    "eval.batch_size=32",
    "sweep.validation_draws=1",
    "precision=fp32",
    "tracking.progress=false",
    "target.heads=4",
    "target.n_iters=100",
    "target.batch_size=16",
)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs the command in this process; (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["transfer", *arguments])
        try:
            code = transfer.main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_sweep_reports_the_rate_and_the_cost_and_is_not_run_twice(command, tmp_path: Path):
    arguments = (*TINY, "heads=1,2", "mup.loglr=-8,-7", f"run_dir={tmp_path / 'sweep'}")
    code, out, _ = command(*arguments)
    assert code == 0
    assert "learning rate for width 64: mup.loglr=" in out
    assert "over the widths the best rate moves by" in out
    folder = tmp_path / "sweep"
    assert {path.name for path in folder.glob("*") if path.is_file()} >= {
        "runs.csv", "transfer.csv", "transfer.json", "transfer.png", "transfer-dark.png",
    }  # fmt: skip
    names = sorted(path.parent.name for path in folder.glob(f"*/{RESULT}"))
    assert names == sorted(f"heads={heads},mup.loglr={rate}" for heads in (1, 2) for rate in (-8, -7))
    found = json.loads((folder / "transfer.json").read_text())
    assert len(found["runs"]) == 4
    # 2 proxy runs: parameters x 8/16 images x 6/100 steps
    proxy = next(run["parameters"] for run in found["runs"] if run["width"] == 16)
    share = 2 * proxy / found["target"]["parameters"] * (8 / 16) * (6 / 100)
    assert f"costs {100 * share:.3g} % of the target run" in out
    assert not list(folder.glob("*/checkpoints"))

    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/metrics.jsonl")}
    code, again, _ = command(*arguments)
    assert code == 0
    assert again == out
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/metrics.jsonl")}

    code, _, err = command(*arguments, "optim.beta2=0.9")
    assert code == 2
    assert "optim" in err
    assert "another run_dir" in err


def test_runs_of_one_width_see_the_same_first_loss_whatever_the_rate(command, tmp_path: Path):
    command(*TINY, "heads=1", "mup.loglr=-9,-3", "sweep.stop.factor=null", f"run_dir={tmp_path}")
    firsts = set()
    for path in tmp_path.glob("*/metrics.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        firsts.add(records[0]["train/loss"])
        assert LOSS in records[-1]
    assert len(firsts) == 1


def test_diverged_run_is_stopped_early_and_has_no_loss(command, tmp_path: Path):
    command(
        *TINY, "heads=1", "mup.loglr=-7,6", "training.n_iters=30", "sweep.stop.patience=2", f"run_dir={tmp_path}"
    )  # fmt: skip
    result = json.loads((tmp_path / "heads=1,mup.loglr=6" / RESULT).read_text())["result"]
    assert result["loss"] is None
    assert result["steps"] < 30
    kept = json.loads((tmp_path / "heads=1,mup.loglr=-7" / RESULT).read_text())["result"]
    assert kept["steps"] == 30


def test_other_swept_options_become_groups(command, tmp_path: Path):
    code, out, _ = command(
        *TINY, "heads=1", "mup.loglr=-7", "model.parametrization=mup,sp", f"run_dir={tmp_path}"
    )  # fmt: skip
    assert code == 0
    assert "parametrization=mup: learning rate" in out
    assert "parametrization=sp: learning rate" in out
    assert "is an end of the grid; widen it" in out


def test_random_search_draws_every_trial_and_reports_the_best(command, tmp_path: Path):
    arguments = (*TINY, "heads=1", "mup.loglr=null", f"run_dir={tmp_path}")
    code, out, _ = command(*arguments, "trial=0,1")
    assert code == 0
    assert "best of 2 trials: loglr" in out
    assert "cost R S_p B_p T_p / (S_t B_t T_t)" in out
    configs = [json.loads(path.read_text()) for path in tmp_path.glob("*/config.json")]
    assert len({config["mup"]["loglr"] for config in configs}) == 2
    results = [json.loads(path.read_text())["result"] for path in tmp_path.glob(f"*/{RESULT}")]
    assert {result["settings"]["loglr"] for result in results} == {config["mup"]["loglr"] for config in configs}


def test_signal_ends_the_sweep_with_the_code_for_requeueing(command, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("mup_dit.transfer_run.run_arm", lambda *_, **__: None)
    code, _, _ = command(*TINY, "heads=1", "mup.loglr=-7", f"run_dir={tmp_path}")
    assert code == cli.EXIT_REQUEUE
    assert SweptOptions.of_sweep is None  # no report of half a sweep


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mup.loglr=null",), "mup.loglr has no value"),
        (("training.epochs=2",), "training.n_iters"),
        (("loglr=-7",), "loglr"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(command, tmp_path: Path, arguments, message: str):
    code, _, err = command(*TINY, "heads=1", "mup.loglr=-7", f"run_dir={tmp_path}", *arguments)
    assert code == 2
    assert message in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"valid": None}}, "data.valid is null"),
        ({"sweep": {"stop": {"factor": 0.5}}}, "sweep.stop.factor=0.5"),
        ({"search": {"loglr": [-5, -9]}}, r"search.loglr=\[-5.0, -9.0\]"),
        ({"target": {"heads": 0}}, "target.heads=0"),
        ({"init_from": "runs/first"}, "init_from has no meaning"),
    ],
)
def test_options_that_cannot_work_are_named(values: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        cli.from_config(TransferConfig, {"model": {}, "data": {"valid": "digits"}, **values})


def test_drawn_options_replace_the_configured_ones():
    values = {"model": {"depth": 1}, "data": {"valid": "digits"}, "training": {"n_iters": 1000}, "trial": 4}
    config = cli.from_config(TransferConfig, values).with_drawn()
    assert config.mup.loglr == config.drawn["loglr"]
    assert config.optim.grad_clip == config.drawn["grad_clip"]
    assert config.optim.warmup == round(1000 * config.drawn["warmup"])
    assert config.with_drawn() == config


def test_help_and_config_run_nothing(command, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags in (("--help",), ("--cfg", "job")):
        code, out, _ = command(*flags)
        assert code in (0, None)
        assert "validation_draws" in out
    assert not any(tmp_path.iterdir())
