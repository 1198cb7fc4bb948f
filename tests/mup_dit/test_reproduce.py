"""The reproduction: its checks can fail, and it runs, ends and continues as it should."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest

from common.report.command import exit_code
from common.report.section_folder import load_section
from common.reproduction.run import reproduce
from mup_dit.reproduce import REPRODUCTION, main, plan
from mup_dit.reproduction.checks import convergence_check, coordinate_checks, transfer_checks
from mup_dit.reproduction.results import arm_name, regret, repeated_seeds
from mup_dit.reproduction.settings import FULL, REPEATS, SMALL, Settings
from mup_dit.sweep import find_transfer
from tests.mup_dit.test_sweep import MUP, SP

TINY = dataclasses.replace(
    SMALL,
    heads=(1, 2),
    loglrs=(-8, -7, -6),
    repeated_rates=(-6,),
    steps=4,
    batch_size=8,
    validation_draws=1,
    validation_points=2,
    log_interval=1,
    check_depth=1,
    check_heads=(1, 2),
    check_steps=2,
    check_seeds=1,
)


# ---------------------------------------------------------------- settings and plan


def test_settings_are_those_of_the_specification_and_survive_json():
    assert (SMALL.widths, SMALL.steps, SMALL.batch_size, SMALL.convergence_steps) == ((32, 64, 128), 200, 64, 580)
    assert sorted(SMALL.loglrs) == [-9, -8, -7, -6, -5, -4]
    assert SMALL.network("mup", 4).base_width == 64
    assert SMALL.network("mup", 8).network.head_size == 16
    assert Settings.from_dict(json.loads(json.dumps(FULL.as_dict()))) == FULL


def test_plan_holds_every_cell_once_and_repeats_both_parametrisations_alike(tmp_path: Path):
    names = [job.name for job in plan(SMALL, [0], tmp_path, "revision")]
    assert len(set(names)) == len(names) == 2 * (18 + (REPEATS - 1) * len(SMALL.repeated_rates)) + 1 + 3
    for parametrization in ("mup", "sp"):
        for seed in repeated_seeds(SMALL, 8, -6, 0):
            assert arm_name(parametrization, 128, -6, seed) in names
    assert repeated_seeds(SMALL, 4, -6, 0) == [0]
    assert repeated_seeds(SMALL, 8, -6, 2) == [6, 7, 8]
    assert sum(name.startswith("mup_init-") for name in [job.name for job in plan(FULL, [0], tmp_path, "r")]) == 20


# ---------------------------------------------------------------- checks


def verdicts(mup=MUP, sp=SP) -> list[bool]:
    lost = {"mup": regret(mup), "sp": regret(sp)}
    return [check.passed for check in transfer_checks(find_transfer(mup), find_transfer(sp), lost)]


def test_losses_of_the_specification_pass_all_checks():
    assert verdicts() == [True] * 5


@pytest.mark.parametrize(
    ("width", "rate", "loss", "failed"),
    [
        (128, -9, 0.10, [0, 1, 3]),  # the optimum moves, and everything that is relative to it
        (128, -5, 0.20, [1]),  # the edge falls
        (32, -4, 0.15, [1]),  # the edges lie apart
        (128, -7, 0.1460, [0, 3]),  # the narrow network's rate is not the best one
    ],
)
def test_each_claim_on_mup_can_fail(width: int, rate: int, loss: float, failed: list[int]):
    changed = {**MUP, width: {**MUP[width], rate: loss}}
    assert [index for index, passed in enumerate(verdicts(mup=changed)) if not passed] == failed


def test_claims_on_sp_fail_for_a_network_that_transfers():
    assert verdicts(sp=MUP) == [True, True, False, True, False]


def test_regret_is_that_of_the_narrow_networks_best_rate():
    narrow, wide = {-8: 0.2, -7: 0.11, -6: 0.1}, {-8: 0.1, -7: 0.3, -6: 0.15}
    assert regret({32: narrow, 128: wide}) == pytest.approx(0.5)
    assert regret({32: narrow, 128: {**wide, -6: math.inf}}) == math.inf


def test_coordinate_check_must_pass_for_mup_and_fail_for_the_controls():
    def verdict(slope: float) -> dict:
        steepest = {"module": "", "step": 1, "slope": slope}
        return {"passed": abs(slope) <= 0.25, "limit": 0.25, "steepest": steepest}

    good = coordinate_checks({"mup": verdict(0.1), "sp": verdict(0.8), "mup_init": verdict(0.9)})
    assert all(check.passed for check in good)
    bad = coordinate_checks({"mup": verdict(0.3), "sp": verdict(0.1), "mup_init": verdict(0.9)})
    assert [check.passed for check in bad] == [False, False, True]
    nothing = {"passed": False, "limit": 0.25, "steepest": None}
    assert not coordinate_checks({"mup": nothing})[0].passed


def test_convergence_check_compares_the_two_losses():
    assert convergence_check(0.1344, 0.1392, (200, 580)).passed
    assert not convergence_check(0.1400, 0.1392, (200, 580)).passed


# ---------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny reproduction: trains all arms through the engine, checks coordinates, reports."""
    output = tmp_path_factory.mktemp("reproduction") / "mup_dit"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.reproduction.run.source_revision", lambda *_: "0" * 64)
        assert reproduce(REPRODUCTION, output, TINY, [0], processes=0) is False  # so few steps reach no threshold
    return output


def test_tiny_reproduction_writes_every_table_and_figure(finished: Path):
    names = {path.name for path in finished.iterdir() if path.is_file()}
    assert {"sweep.csv", "convergence.csv", "slopes.csv", "cost.csv", "checks.csv", "results.json"} <= names
    for stem in ("transfer", "coordinates", "convergence"):
        assert {f"{stem}.png", f"{stem}-dark.png"} <= names
    section = load_section(finished)
    assert len(section.checks) == 5 + 1 + 3
    assert [row[:2] for row in section.tables[0].rows] == [["muP", 16], ["muP", 32], ["SP", 16], ["SP", 32]]
    assert str(finished) not in (finished / "section.html").read_text()


def test_cells_of_the_table_are_means_over_their_seeds(finished: Path):
    results = json.loads((finished / "results.json").read_text())["values"]["results"]
    losses = [results[arm_name("mup", 32, -6, seed)]["loss"] for seed in repeated_seeds(TINY, 2, -6, 0)]
    assert len(set(losses)) == 3
    row = next(row for row in load_section(finished).tables[0].rows if row[:2] == ["muP", 32])
    assert row[2].split()[0] == f"{sum(losses) / 3:.4f}"


def test_runs_of_one_seed_differ_in_rate_only(finished: Path):
    firsts = {}
    for path in (finished / "runs").glob("sp-width32-*-seed0-*"):
        firsts[path.name] = json.loads((path / "metrics.jsonl").read_text().splitlines()[0])["train/loss"]
    assert len(firsts) == 3
    assert len(set(firsts.values())) == 1


def test_second_run_reuses_everything(finished: Path, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr("common.reproduction.run.source_revision", lambda *_: "0" * 64)
    reproduce(REPRODUCTION, finished, TINY, [0], processes=0)
    assert capsys.readouterr().out.count("(kept)") == len(plan(TINY, [0], finished, "any"))


def test_third_arm_and_seeds_reach_the_section(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("common.reproduction.run.source_revision", lambda *_: "0" * 64)
    settings = dataclasses.replace(TINY, parametrizations=FULL.parametrizations, loglrs=(-7, -6), steps=2)
    reproduce(REPRODUCTION, tmp_path / "out", settings, [0, 1], processes=0)
    section = load_section(tmp_path / "out")
    assert {"muP", "SP", "muP init + AdamW"} == {row[0] for row in section.tables[0].rows}
    assert "seeds" in [table.name for table in section.tables]
    assert sum("(seed 1)" in check.claim for check in section.checks) == 6


def test_command_refuses_what_cannot_work(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["reproduce", "--output", str(tmp_path)])
    assert exit_code(main) == 2
    assert "not empty" in capsys.readouterr().err
