"""The runner finds benchmarks without importing them, isolates failures, and replaces only its own sections."""

import sys
from pathlib import Path

import pytest

from benchmarks.run import discover, main, section, select, tables, update
from common.errors import ConfigError
from common.report.command import exit_code

GOOD = '''"""Two ways to count."""


def measure():
    return {
        "ratio": 3.25,
        "slow": {"seconds": 2.0, "peak": 10},
        "by size": {"8": {"ms": 1.0}, "16": {"ms": 2.0}},
        "checks": [{"claim": "faster", "measured": 3.25, "threshold": ">= 3", "passed": True}],
    }
'''
BAD = '"""Never works."""\n\n\ndef measure():\n    raise RuntimeError("broken on purpose")\n'
MISSED = '''"""Too slow."""


def measure():
    return {"checks": [{"claim": "c", "measured": 1, "threshold": 2, "passed": False}]}
'''
SCRIPT = '''"""Needs options, so it is a script."""

import json
import sys


def measure(options, arguments):
    return {"benchmark": "script", "ratios": [{"name": "quick", "ratio": 2.0, "target": 1.5}]}


if __name__ == "__main__":
    with open(sys.argv[sys.argv.index("--json") + 1], "w") as file:
        json.dump(measure(None, None), file)
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "made"
    path.mkdir()
    (path / "counting.py").write_text(GOOD)
    (path / "broken.py").write_text(BAD)
    (path / "missed.py").write_text(MISSED)
    (path / "script.py").write_text(SCRIPT)
    (path / "helper.py").write_text('raise SystemExit("must not be imported")\n')
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks.run", *map(str, arguments)])
    return exit_code(main)


def test_discovery_reads_sources_only(folder: Path):
    assert [(b.name, b.summary) for b in discover(folder)] == [
        ("broken", "Never works."),
        ("counting", "Two ways to count."),
        ("missed", "Too slow."),
        ("script", "Needs options, so it is a script."),
    ]


def test_every_benchmark_of_the_repository_says_what_it_measures():
    found = discover()
    assert "trainer_overhead" in {benchmark.name for benchmark in found}
    assert all(len(benchmark.summary) > 20 for benchmark in found)


def test_unknown_name_lists_the_known_ones(folder: Path):
    with pytest.raises(ConfigError, match="'sampling' is not known; choose of broken, counting"):
        select(discover(folder), ["sampling"])


def test_results_become_tables():
    values, by_size = tables({"ratio": 2.0, "slow": {"s": 1.0}, "by size": {"8": {"ms": 1.0}, "16": {"ms": 2.0}}})
    assert values.rows == [["ratio", 2.0], ["slow / s", 1.0]]
    assert by_size.columns == ["by size", "ms"]
    assert by_size.rows == [["8", 1.0], ["16", 2.0]]


def test_update_replaces_one_section_and_keeps_the_rest():
    text = update(update("# Mine\n\nkeep me\n", "a on CPU", "old a"), "b on CPU", "b \\1 text")
    again = update(text, "a on CPU", "new a")
    assert "old a" not in again
    assert again.startswith("# Mine\n\nkeep me\n")
    assert "b \\1 text" in again
    assert again.index("new a") < again.index("b \\1 text")
    assert update(again, "a on CPU", "new a") == again


def test_runner_writes_hardware_date_revision_and_ratios(folder: Path, tmp_path: Path, monkeypatch):
    results = tmp_path / "RESULTS.md"
    assert run(monkeypatch, "counting", "--folder", folder, "--results", results, "--threads", 1) == 0
    text = results.read_text()
    for part in (
        "## counting on ",
        "Two ways to count.",
        "revision ",
        "cpu ",
        "torch ",
        "| ratio | 3.250 |",
        "| PASS |",
    ):
        assert part in text, part
    assert str(folder) not in text


def test_failing_benchmark_keeps_its_section_and_fails_the_run(folder: Path, tmp_path: Path, monkeypatch, capfd):
    results = tmp_path / "RESULTS.md"
    before = update("", "broken on CPU", "yesterday's")
    results.write_text(before)
    assert run(monkeypatch, "broken", "--folder", folder, "--results", results) == 1
    assert results.read_text() == before
    assert "broken on purpose" in capfd.readouterr().err


def test_missed_threshold_fails_the_run_but_is_recorded(folder: Path, tmp_path: Path, monkeypatch):
    results = tmp_path / "RESULTS.md"
    assert run(monkeypatch, "missed", "--folder", folder, "--results", results) == 1
    assert "| FAIL |" in results.read_text()


def test_benchmark_with_options_runs_as_a_script(folder: Path, tmp_path: Path, monkeypatch):
    results = tmp_path / "RESULTS.md"
    assert run(monkeypatch, "script", "--folder", folder, "--results", results) == 0
    assert "| quick | 2.00x | >= 1.5x | PASS |" in results.read_text()


def test_bad_options_are_usage_errors(folder: Path, monkeypatch, capsys):
    assert run(monkeypatch, "nothing", "--folder", folder) == 2
    assert run(monkeypatch, "counting", "--folder", folder, "--threads", 0) == 2
    assert "--threads=0" in capsys.readouterr().err


def test_sections_of_other_devices_live_side_by_side(folder: Path, monkeypatch):
    (benchmark,) = select(discover(folder), ["counting"])
    monkeypatch.setattr("benchmarks.run.hardware", lambda: {"cpu": "x", "cores": "2", "gpu": "Fast GPU"})
    key, content = section(benchmark, {"ratio": 1.0}, threads=2, seconds=1.0)
    assert key == "counting on Fast GPU"
    assert "2 threads" in content
