"""The reproduction: its numbers are right, its checks can fail, and it runs, ends and continues as it should."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.report.command import exit_code
from common.report.section_folder import load_section
from common.reproduction.run import reproduce
from diffullama.reproduce import REPRODUCTION, main, plan
from diffullama.reproduction import sweep as sweeping
from diffullama.reproduction.checks import adaptation_checks, margin_check, paired, suffix_check
from diffullama.reproduction.figures import TRAILING, trailing_mean
from diffullama.reproduction.scoring import bound, cloze, cloze_positions, infill, measured, spans
from diffullama.reproduction.settings import FULL, LEARNING_RATES, SMALL, SWEPT_RATES, Settings
from diffullama.reproduction.sweep import sweep
from diffullama.reproduction.training import build_model, objective

TINY = dataclasses.replace(
    SMALL,
    vocab_size=300,
    length=16,
    width=16,
    layers=1,
    heads=2,
    ar_steps=4,
    adapt_steps=3,
    anneal_steps=2,
    batch_size=4,
    warmup=2,
    test_blocks=8,
    draws=4,
    cloze_positions=2,
    span=2,
    span_starts=(4, 8),
    infill_blocks=4,
    held_out_blocks=4,
    held_out_points=2,
    shown=2,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = build_model(TINY).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


@pytest.fixture(scope="module")
def x_BL() -> torch.Tensor:
    return torch.randint(1, TINY.mask_id, (8, TINY.length), generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- settings


def test_arms_have_the_steps_of_the_specification():
    steps = {arm.name: arm.steps for arm in FULL.arms()}
    a, d = SMALL.ar_steps, SMALL.adapt_steps
    assert steps == {
        "ar": a,
        "adapt": d,
        "scratch-equal": d,
        "scratch-total": a + d,
        "no-shift": d,
        "no-annealing": d,
    }
    assert [arm.name for arm in SMALL.arms()] == ["ar", "adapt", "scratch-equal", "scratch-total"]
    assert {arm.name for arm in FULL.arms() if arm.parent} == {"adapt", "no-shift", "no-annealing"}


def test_every_arm_has_one_of_the_swept_rates():
    assert set(LEARNING_RATES) == {arm.name for arm in FULL.arms()}
    assert set(LEARNING_RATES.values()) <= set(SWEPT_RATES)


def test_settings_survive_json():
    assert Settings.from_dict(json.loads(json.dumps(FULL.as_dict()))) == FULL


def test_objectives_differ_in_what_the_arms_are_named_after():
    found = {arm.name: objective(arm) for arm in FULL.arms()}
    assert found["ar"].is_causal
    assert (found["adapt"].shift, found["adapt"].anneal_steps) == (True, SMALL.anneal_steps)
    assert (found["no-shift"].shift, found["no-shift"].anneal_steps) == (False, SMALL.anneal_steps)
    assert (found["no-annealing"].shift, found["no-annealing"].anneal_steps) == (True, 1)
    assert all(one.loss_norm == "tokens" for one in found.values())


def test_network_has_the_size_of_the_specification():
    network = build_model(SMALL)
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(0.93e6, rel=0.01)
    assert network.mask_id == 1023


# ---------------------------------------------------------------- numbers


def test_cloze_hides_one_token_and_the_baseline_sees_the_left_only(model, x_BL):
    position_BK = cloze_positions(TINY, len(x_BL))
    assert position_BK.shape == (8, 2)
    assert int(position_BK.min()) >= 1
    assert all(len(set(row)) == 2 for row in position_BK.tolist())
    both, left = (cloze(model, x_BL, position_BK, causal=causal) for causal in (False, True))
    row, position = 3, int(position_BK[3, 0])
    with torch.no_grad():
        z_1L = x_BL[row : row + 1].clone()
        z_1L[0, position] = model.mask_id
        at = torch.zeros_like(z_1L, dtype=torch.bool)
        at[0, position] = True
        alone = -model(z_1L, where=at)[0, x_BL[row, position]]
        prefix = (
            -model(x_BL[row : row + 1, :position], causal=True)[0, -1]
            .index_fill(0, torch.tensor([model.mask_id]), -torch.inf)
            .log_softmax(-1)[x_BL[row, position]]
        )
    single = position_BK[:, :1]
    assert cloze(model, x_BL, single, causal=False)["nll"]["blocks"][row] == pytest.approx(float(alone), abs=1e-4)
    assert cloze(model, x_BL, single, causal=True)["nll"]["blocks"][row] == pytest.approx(float(prefix), abs=1e-4)
    assert both["nll"]["mean"] != left["nll"]["mean"]
    assert 0 <= both["accuracy"]["mean"] <= 1


def test_bound_has_an_error_of_its_masks_and_a_value_per_block(model, x_BL):
    values = [bound(model, x_BL, draws=4, seed=seed) for seed in range(30)]
    means = [value["mean"] for value in values]
    assert np.mean([value["mask_error"] for value in values]) == pytest.approx(np.std(means), rel=0.4)
    assert len(values[0]["blocks"]) == len(x_BL)
    assert np.mean(values[0]["blocks"]) == pytest.approx(values[0]["mean"], abs=1e-5)


def test_gain_is_paired_over_the_same_blocks(model, x_BL):
    found = spans(model, x_BL, TINY)
    per_block = np.array(found["without_suffix"]["blocks"]) - np.array(found["with_suffix"]["blocks"])
    np.testing.assert_allclose(found["gain"]["blocks"], per_block, atol=2e-6)
    assert found["gain"]["error"] == pytest.approx(per_block.std(ddof=1) / math.sqrt(len(per_block)), rel=1e-3)


@pytest.mark.parametrize("causal", [False, True])
def test_infilling_changes_the_gap_only_and_leaves_no_mask(model, x_BL, causal: bool):
    written_BL, found = infill(model, x_BL, TINY, causal=causal, seed=0)
    outside = torch.ones(TINY.length, dtype=torch.bool)
    outside[7:9] = False
    assert torch.equal(written_BL[:, outside], x_BL[:, outside])
    assert found["masks"] == found["changed_outside"] == 0


# ---------------------------------------------------------------- checks


def scores(**changes: float) -> dict[str, dict]:
    """Scores that pass, with some numbers changed: ``adapt_bound=5.5``."""

    def values(mean: float, error: float = 0.01) -> dict:
        blocks = [mean - error, mean + error]
        return {"mean": mean, "error": error, "mask_error": error, "blocks": blocks}

    means = {"adapt": (5.0, 4.0), "scratch-equal": (5.9, 5.6), "scratch-total": (5.5, 4.9)}
    found = {}
    for arm, (nats, hidden) in means.items():
        key = arm.replace("-", "_")
        nats, hidden = changes.get(f"{key}_bound", nats), changes.get(f"{key}_cloze", hidden)
        found[arm] = {
            "bound": values(nats),
            "bound_by_time": {"mean": nats + changes.get("shifted", 0.0), "error": 0.01},
            "cloze": {"nll": values(hidden)},
            "spans": {"gain": {"mean": changes.get("gain", 0.05), "error": 0.01, "blocks": []}},
            "infill": {"masks": int(changes.get("masks", 0)), "changed_outside": 0},
        }
    return found


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, []),
        ({"scratch_equal_bound": 5.49}, [0]),
        ({"scratch_total_bound": 5.19}, [1]),
        ({"adapt_bound": 5.41, "scratch_equal_bound": 6.0, "scratch_total_bound": 5.7}, [2]),
        ({"gain": 0.02}, [3]),
        ({"scratch_total_cloze": 4.29}, [4]),
        ({"masks": 1}, [5]),
        ({"shifted": 0.05}, [6]),
    ],
)
def test_each_threshold_can_fail(changes: dict, failed: list[int]):
    checks = adaptation_checks(scores(**changes))
    assert [index for index, check in enumerate(checks) if not check.passed] == failed


def test_ablations_are_judged_where_they_were_run():
    found = scores()
    found["no-shift"] = {**found["adapt"], "bound": {**found["adapt"]["bound"], "blocks": [5.2, 5.3]}}
    found["no-annealing"] = {**found["adapt"], "bound": {**found["adapt"]["bound"], "blocks": [4.92, 4.93]}}
    *_, shift, annealing = adaptation_checks(found)
    assert (shift.passed, annealing.passed) == (False, True)
    found["no-annealing"]["bound"]["blocks"] = [4.88, 4.89]
    assert not adaptation_checks(found)[-1].passed


def test_paired_difference_has_the_error_of_the_differences():
    rng = np.random.default_rng(0)
    hard_B = rng.normal(5, 3, size=50)
    difference = paired(measured(hard_B - 1 + rng.normal(0, 0.1, 50)), measured(hard_B))
    assert difference.value == pytest.approx(-1, abs=0.05)
    assert difference.standard_error == pytest.approx(0.1 / math.sqrt(50), rel=0.3)
    assert margin_check("", measured(hard_B - 1), measured(hard_B), 0.9).passed
    assert not suffix_check(measured([0.1, -0.1, 0.05])).passed


# ---------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny reproduction: trains all arms through the engine, scores, infills, reports."""
    output = tmp_path_factory.mktemp("reproduction") / "diffullama"
    settings = dataclasses.replace(TINY, ablations=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.reproduction.run.source_revision", lambda *_: "0" * 64)
        assert reproduce(REPRODUCTION, output, settings, [0], processes=0) is False  # so few steps reach no threshold
    return output


def test_tiny_reproduction_writes_every_table_and_figure(finished: Path):
    names = {path.name for path in finished.iterdir() if path.is_file()}
    assert {"arms.csv", "infilling.csv", "curves.csv", "checks.csv", "results.json", "section.html"} <= names
    for stem in ("curves", "infilling"):
        assert {f"{stem}.png", f"{stem}-dark.png"} <= names
    section = load_section(finished)
    assert len(section.checks) == 9
    assert [row[0] for row in section.tables[0].rows][:4] == ["AR parent", "adapt", "scratch=", "scratch+"]
    assert "[[" in section.listings["infilled by the adapted network (greedy, in order of confidence)"]
    assert str(finished) not in (finished / "section.html").read_text()


def test_arms_from_scratch_start_alike_and_adaptation_elsewhere(finished: Path):
    results = json.loads((finished / "results.json").read_text())["values"]["results"]
    assert results["start-seed0"]["bound"]["mean"] > 0
    runs = {path.name.split("-seed")[0]: path for path in (finished / "runs").iterdir()}
    first = {
        name: json.loads((path / "metrics.jsonl").read_text().splitlines()[0])["train/loss"]
        for name, path in runs.items()
    }
    # data, times and masks of the first step are the same for all
    assert first["scratch-equal"] == first["scratch-total"] != first["adapt"]


def test_second_run_reuses_everything(finished: Path, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr("common.reproduction.run.source_revision", lambda *_: "0" * 64)
    settings = dataclasses.replace(TINY, ablations=True)
    reproduce(REPRODUCTION, finished, settings, [0], processes=0)
    assert capsys.readouterr().out.count("(kept)") == len(plan(settings, [0], finished, "any"))


def test_parents_come_before_their_children_in_the_plan(tmp_path: Path):
    jobs = plan(FULL, [0, 1], tmp_path, "revision")
    seen: set[str] = set()
    for job in jobs:
        assert set(job.needs) <= seen, job.name
        seen.add(job.name)
    assert len(jobs) == 1 + 2 * (6 + 6 + 1)


def test_seeds_reach_the_section(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("common.reproduction.run.source_revision", lambda *_: "0" * 64)
    reproduce(REPRODUCTION, tmp_path / "out", dataclasses.replace(TINY, ar_steps=2, adapt_steps=2), [0, 1], processes=0)
    section = load_section(tmp_path / "out")
    tables = {table.name: table for table in section.tables}
    assert tables["seeds"].rows[1][1] == 2
    assert sum("(seed 1)" in check.claim for check in section.checks) == 7


def test_sweep_tries_every_rate_and_takes_the_better_parent(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sweeping, "source_revision", lambda *_: "0" * 64)
    table = sweep(dataclasses.replace(TINY, ar_steps=2, adapt_steps=2), tmp_path / "sweep", 0, processes=0)
    assert [row[0] for row in table.rows] == ["AR parent", "adapt", "scratch=", "scratch+"]
    for row in table.rows:
        assert row[-1] == SWEPT_RATES[int(np.argmin([float(value) for value in row[2:4]]))]
    assert (tmp_path / "sweep" / "sweep.csv").is_file()


def test_command_refuses_what_cannot_work(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["reproduce", "--output", str(tmp_path)])
    assert exit_code(main) == 2
    assert "not empty" in capsys.readouterr().err


def test_trailing_mean_averages_what_came_before():
    np.testing.assert_allclose(trailing_mean([4.0, 2.0, 0.0]), [4, 3, 2])
    ramp = np.arange(100.0)
    assert trailing_mean(ramp)[-1] == pytest.approx(ramp[-TRAILING:].mean())
