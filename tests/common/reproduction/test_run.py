"""The driver of all reproductions: what it writes, keeps and refuses, and its exit codes."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.report import Check, Section, Table
from common.report.command import exit_code
from common.report.section_folder import load_section
from common.reproduction import run
from common.reproduction.jobs import Interrupted, Job
from common.reproduction.run import FULL_SEEDS, Reproduction, claim, reproduce, run_command, seeds, source_revision


@dataclass(frozen=True)
class Settings:
    limit: int = 2

    def as_dict(self) -> dict:
        return asdict(self)


def build_section(settings: Settings, run_seeds, results, facts) -> Section:
    value = results["only"]["a"]
    return Section(
        title="toy",
        checks=[
            Check(claim="small", measured=str(value), threshold=f"< {settings.limit}", passed=value < settings.limit)
        ],
        tables=[Table(name="table", columns=["a"], rows=[[value]])],
        facts=dict(facts),
    )


def toy(**options) -> Reproduction:
    values = {
        "paper": "radd",
        "plan": lambda *_: [Job("only", "json:loads", {"s": '{"a": 1}'})],
        "summary": lambda name, result: f"a is {result['a']}",
        "build_section": build_section,
        "presentation": (),
        "small": Settings(),
        "full": Settings(limit=1),
        "full_help": "more",
    }
    return Reproduction(**values | options)


@pytest.fixture(autouse=True)
def fixed_revision(monkeypatch):
    monkeypatch.setattr(run, "source_revision", lambda *_: "0" * 64)


def command(monkeypatch, *arguments: object, **options) -> int:
    monkeypatch.setattr(sys, "argv", ["reproduce", *map(str, arguments)])
    return exit_code(lambda: run_command(toy(**options), "What it shows.\n\n    usage"))


def test_section_holds_results_settings_and_origin(tmp_path: Path, capsys):
    assert reproduce(toy(), tmp_path / "out", Settings(), [0, 1], processes=0)
    section = load_section(tmp_path / "out")
    assert section.passed
    assert section.facts["seeds"] == "0, 1"
    assert '"limit": 2' in section.listings["settings"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["values"]["results"] == {"only": {"a": 1}}
    assert "radd [ 1/1] only: a is 1" in capsys.readouterr().out
    assert reproduce(toy(), tmp_path / "out", Settings(), [0, 1], processes=0)
    assert "(kept)" in capsys.readouterr().out


def test_exit_code_says_whether_the_thresholds_hold(tmp_path: Path, monkeypatch, capsys):
    assert command(monkeypatch, "--output", tmp_path / "out", "--processes", 1) == 0
    assert command(monkeypatch, "--output", tmp_path / "out", "--processes", 1, "--full") == 1
    assert command(monkeypatch, "--output", tmp_path / "out", "--processes", 0) == 2
    assert command(monkeypatch, "--output", tmp_path / "out", "--seed", -1) == 2
    assert "--seed=-1 is negative" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (Interrupted("stopped"), 85)])
def test_interruption_says_that_the_same_command_continues(tmp_path: Path, monkeypatch, capsys, error, code):
    def stop(*_: object) -> list[Job]:
        raise error

    assert command(monkeypatch, "--output", tmp_path / "out", plan=stop) == code
    assert "the same command continues" in capsys.readouterr().err


def test_foreign_folder_is_refused_untouched(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        claim(tmp_path, "radd")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_full_runs_more_seeds():
    assert seeds(3, full=False) == [3]
    assert seeds(3, full=True) == list(range(3, 3 + FULL_SEEDS))


def test_revision_follows_the_sources_but_not_their_presentation(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(run, "SOURCES", tmp_path)
    for name in ("common/a.py", "radd/b.py", "radd/reproduction/figures.py", "common/report/page.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")

    def after(name: str) -> str:
        (tmp_path / name).write_text("2")
        return source_revision("radd", ("figures.py",))

    first = source_revision("radd", ("figures.py",))
    assert after("radd/reproduction/figures.py") == after("common/report/page.py") == first
    assert after("radd/b.py") != first
