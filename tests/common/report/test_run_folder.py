"""A page from any run folder, also from one that is cut off, and the two commands."""

import json
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from common.errors import DataError
from common.report import Check, Section
from common.report.__main__ import main as report_main
from common.report.__main__ import parse
from common.report.command import exit_code
from common.report.quickstart import main as quickstart_main
from common.report.run_folder import read_metrics, run_page
from common.report.section_folder import save_section


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "my-run"
    (folder / "checkpoints" / "step_00000020").mkdir(parents=True)
    records = [{"step": s, "time": 0.1 * s, "train/loss": 3 - s / 100, "note": "text"} for s in range(0, 30, 10)]
    records[1]["validation/loss"] = 2.5
    records[2]["train/loss"] = float("nan")
    lines = [json.dumps(record) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + '{"step": 30, "train/lo')
    (folder / "config.json").write_text(json.dumps({"training": {"seed": 7}, "name": "<b>x</b>"}))
    manifest = {"step": 20, "revision": "abc123", "versions": {"torch": "2.12.1"}, "files": {"a": 1}}
    (folder / "checkpoints" / "step_00000020" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "samples" / "iter_20").mkdir(parents=True)
    (folder / "samples" / "iter_20" / "sample_0.txt").write_text("hello <world>")
    matplotlib.image.imsave(folder / "samples" / "iter_20" / "grid.png", np.zeros((8, 8)))
    return folder


def test_truncated_last_line_is_skipped_and_said(run_dir: Path):
    metrics = read_metrics(run_dir / "metrics.jsonl")
    assert metrics.columns["train/loss"][0] == [0, 10, 20]
    assert metrics.columns["validation/loss"] == ([10], [2.5])
    assert "note" not in metrics.columns
    assert len(metrics.problems) == 1
    assert "line 4 (the last one" in metrics.problems[0]


def test_page_holds_curves_configuration_origin_and_samples(run_dir: Path, capsys: pytest.CaptureFixture):
    page = run_page(run_dir)
    training, samples, origin = page.sections
    assert [figure.name for figure in training.figures] == ["loss"]
    assert "line 4" in training.text
    assert samples.listings == {"sample_0.txt": "hello <world>"}
    assert len(samples.figures) == 1
    assert origin.facts["seed"] == "7"
    assert origin.facts["checkpoint revision"] == "abc123"
    assert origin.facts["checkpoint versions"] == "torch 2.12.1"
    assert "page revision" in origin.facts
    assert "page cpu" in origin.facts
    assert "<b>x</b>" in origin.listings["configuration"]


def test_damaged_parts_are_named_not_fatal(run_dir: Path):
    (run_dir / "config.json").write_text("{")
    (run_dir / "checkpoints" / "step_00000020" / "manifest.json").write_bytes(b"\xff\xfe")
    text = run_page(run_dir).sections[0].text
    assert "config.json" in text
    assert "manifest.json" in text


@pytest.mark.parametrize("content", [None, "", "not json\n"])
def test_folder_without_a_record_is_an_error(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        run_page(tmp_path)


def test_command_accepts_both_spellings(run_dir: Path):
    assert parse([str(run_dir)]).output == str(run_dir / "report.html")
    found = parse([f"run_dir={run_dir}", "output=a.html"])
    assert (found.run_dir, found.output) == (str(run_dir), "a.html")
    assert parse([str(run_dir), "--output", "b.html"]).output == "b.html"


def test_command_writes_the_page_and_reports_errors(run_dir: Path, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(sys, "argv", ["report", str(run_dir)])
    assert exit_code(report_main) == 0
    assert "hello &lt;world&gt;" in (run_dir / "report.html").read_text()
    monkeypatch.setattr(sys, "argv", ["report", str(run_dir / "missing")])
    assert exit_code(report_main) == 2
    assert "missing is not a folder" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["report", "a", "b"])
    assert exit_code(report_main) == 2


def test_quickstart_combines_what_exists(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(sys, "argv", ["quickstart", str(tmp_path)])
    assert exit_code(quickstart_main) == 2
    assert "quickstart.sh" in capsys.readouterr().err
    for paper, passed in (("radd", True), ("rpg", False)):
        check = Check(claim=f"claim of {paper}", measured="1", threshold="1", passed=passed)
        save_section(tmp_path / paper, Section(title=f"{paper} section", checks=[check]))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{")
    assert exit_code(quickstart_main) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.index("radd section") < page.index("rpg section")
    assert "run the reproduction again" in page
    printed = capsys.readouterr().out
    assert "claim of radd" in printed
    assert "1 of 1 checks" in printed
    assert "FAIL" in printed
