"""Sweeps: optimum, edge, transfer, cost, early stopping, and runs that are continued, reused or refused."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import CheckpointError, ConfigError, DataError
from common.nonfinite import NonFiniteError
from common.trainer import FitResult
from mup_dit.arms import (
    LOSS,
    RESULT,
    Arm,
    Diverged,
    Repeated,
    StopDiverged,
    StopRule,
    flat,
    read_arm,
    read_sweep,
    run_arm,
    siblings,
    training_curve,
)
from mup_dit.datasets import build_dataset
from mup_dit.sweep import (
    ArmResult,
    RunSize,
    divergence_edge,
    exceeds,
    find_optimum,
    find_transfer,
    measured_cost,
    rows_of,
    stopped_at,
    to_csv,
    to_json,
    tuning_cost,
    vertex,
)
from mup_dit.transfer_figure import transfer_figure

# The table of the specification, section 10: loglr -4 to -9.
RATES = (-4, -5, -6, -7, -8, -9)
MUP = {
    32: dict(zip(RATES, (0.4943, 0.1743, 0.1422, 0.1402, 0.1422, 0.1501), strict=True)),
    64: dict(zip(RATES, (0.2984, 0.1724, 0.1422, 0.1365, 0.1376, 0.1480), strict=True)),
    128: dict(zip(RATES, (0.4537, 0.1507, 0.1376, 0.1344, 0.1389, 0.1463), strict=True)),
}
SP = {
    32: dict(zip(RATES, (0.1574, 0.1415, 0.1364, 0.1388, 0.1432, 0.1522), strict=True)),
    64: dict(zip(RATES, (0.4193, 0.1862, 0.1387, 0.1351, 0.1376, 0.1484), strict=True)),
    128: dict(zip(RATES, (0.6732, 0.2815, 0.3300, 0.1368, 0.1360, 0.1409), strict=True)),
}


def arm_result(**changes) -> ArmResult:
    values = {
        "width": 32,
        "loglr": -7.0,
        "seed": 0,
        "loss": 0.14,
        "steps": 100,
        "planned_steps": 100,
        "batch_size": 64,
        "parameters": 1000,
    }
    return ArmResult(**{**values, **changes})


# ---------------------------------------------------------------- optimum and edge


def test_argmins_and_edges_of_the_specification():
    mup, sp = find_transfer(MUP), find_transfer(SP)
    assert [optimum.loglr for optimum in mup.optima.values()] == [-7, -7, -7]
    assert [optimum.edge for optimum in mup.optima.values()] == [-5, -5, -5]
    assert [optimum.loglr for optimum in sp.optima.values()] == [-6, -7, -8]
    assert [optimum.edge for optimum in sp.optima.values()] == [-4, -6, -7]
    assert mup.vertex_spread <= 0.6
    assert (mup.regret, mup.edge_drop, sp.edge_drop) == (0, 0, 3)
    assert sp.regret == pytest.approx(1.43, abs=0.01)
    assert (mup.holds, sp.holds) == (True, False)


@given(centre=st.floats(-7.5, -6.5), curvature=st.floats(0.01, 1.0))
def test_vertex_is_the_minimum_of_a_parabola_in_log_loss(centre: float, curvature: float):
    row = {rate: 0.1 * math.exp(curvature * (rate - centre) ** 2) for rate in (-9.0, -8.0, -7.0, -6.0, -5.0)}
    assert vertex(row) == pytest.approx(centre, abs=1e-6)


def test_vertex_at_an_end_or_beside_a_diverged_run_is_the_best_rate_itself():
    assert vertex({-8: 0.3, -7: 0.2, -6: 0.1}) == -6
    assert vertex({-8: 0.3, -7: 0.2, -6: math.inf}) == -7
    found = find_optimum({-8: 0.3, -7: 0.2, -6: 0.1})
    assert found.at_end
    assert found.capped


def test_vertex_of_rates_that_are_not_evenly_spaced():
    row = {rate: math.exp(0.1 * (rate + 6.8) ** 2) for rate in (-9, -7, -6.5)}
    assert vertex(row) == pytest.approx(-6.8)


def test_edge_is_the_largest_rate_within_the_factor_even_behind_a_worse_one():
    assert divergence_edge({-7: 0.1, -6: 0.5, -5: 0.12}) == -5
    assert divergence_edge({-7: 0.1, -6: 0.1301, -5: math.inf}) == -7


def test_a_width_without_a_finite_loss_is_an_error_that_names_smaller_rates():
    with pytest.raises(DataError, match=r"2\^-6 to 2\^-5 diverged.*mup\.loglr=-9,-8,-7"):
        find_optimum({-6: math.inf, -5: math.inf})
    with pytest.raises(DataError, match="no finished run"):
        find_transfer({})


def test_losses_are_averaged_over_seeds_and_a_diverged_seed_is_a_diverged_rate():
    rows = rows_of([arm_result(seed=0, loss=0.1), arm_result(seed=1, loss=0.3), arm_result(loglr=-5.0, loss=math.inf)])
    assert rows == {32: {-7.0: pytest.approx(0.2), -5.0: math.inf}}


def test_regret_is_unknown_where_the_transferred_rate_was_not_run():
    found = find_transfer({32: {-7: 0.1, -6: 0.2, -8: 0.2}, 64: {-9: 0.1, -8: 0.09}})
    assert found.regret is None
    assert not found.holds


# ---------------------------------------------------------------- cost


def test_cost_of_the_papers_searches():
    pixart = tuning_cost(
        5,
        RunSize(parameters=39_246_656, batch_size=1, steps=5),
        RunSize(parameters=610_856_096, batch_size=1, steps=30),
    )
    assert pixart == pytest.approx(0.054, abs=0.0005)  # specification 1: exact sizes give 5.4 %
    dit = tuning_cost(
        5,
        RunSize(parameters=42_624_608, batch_size=256, steps=200_000),
        RunSize(parameters=675_129_632, batch_size=256, steps=2_400_000),
    )
    assert dit == pytest.approx(0.026, abs=0.0005)  # specification 9.5
    with pytest.raises(ConfigError, match="target.n_iters"):
        tuning_cost(1, RunSize(parameters=1, batch_size=1, steps=1), RunSize(parameters=1, batch_size=1, steps=0))


def test_measured_cost_counts_stopped_runs_up_to_where_they_stopped():
    target = RunSize(parameters=1000, batch_size=64, steps=1000)
    assert measured_cost([arm_result(), arm_result(steps=40, loss=math.inf)], target) == pytest.approx(0.14)


# ---------------------------------------------------------------- early stopping


def test_only_a_streak_above_the_best_at_the_same_step_is_divergence():
    best = {10: 1.0, 20: 0.5, 30: 0.2}
    assert exceeds({10: 1.0, 20: 0.9, 30: 0.4}, [best], factor=1.5, patience=2)
    assert not exceeds({10: 2.0, 20: 0.7, 30: 0.4}, [best], factor=1.5, patience=2)
    assert not exceeds({10: 9.0}, [best], factor=1.5, patience=2)
    assert not exceeds({40: 9.0, 50: 9.0}, [best], factor=1.5, patience=2)  # nobody else was there
    assert exceeds({40: math.inf, 50: math.inf}, [best], factor=1.5, patience=2)
    assert not exceeds({20: 9.0, 30: 9.0}, [], factor=1.5, patience=2)


def test_early_stopping_of_complete_curves_ends_the_diverged_run_only():
    good = {step: 1 / step for step in range(10, 101, 10)}
    bad = {step: 0.1 if step < 50 else 1.0 for step in range(10, 101, 10)}
    found = stopped_at({-7: good, -4: bad}, factor=1.5, patience=2, first_step=20)
    assert set(found) == {-4}
    assert found[-4] <= 60


class FakeState:
    """What the hook sees of a run."""

    is_main = True

    def __init__(self, run_dir, step):
        self.run_dir, self.step, self.parallel = run_dir, step, self

    @staticmethod
    def from_main(value):
        return value


def write_curve(run_dir, losses, interval=10):
    run_dir.mkdir(parents=True, exist_ok=True)
    records = [{"step": interval * (i + 1), "train/loss": loss} for i, loss in enumerate(losses)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_hook_stops_a_hopeless_run_and_leaves_others_alone(tmp_path):
    write_curve(tmp_path / "good", [0.5, 0.3, 0.2])
    write_curve(tmp_path / "bad", [0.5, 0.6, None])
    rule = StopRule(patience=2)
    for name, stops in (("good", False), ("bad", True)):
        others = [tmp_path / other for other in ("good", "bad", "missing") if other != name]
        hook = StopDiverged(rule, lambda others=others: others, every_steps=10, total_steps=100)
        hook(FakeState(tmp_path / name, 5))  # too early to judge
        if stops:
            with pytest.raises(Diverged, match="1.5 times"):
                hook(FakeState(tmp_path / name, 40))
        else:
            hook(FakeState(tmp_path / name, 40))
    assert training_curve(tmp_path / "bad")[-1] == (30, None)


@pytest.mark.parametrize(("option", "value"), [("factor", 1.0), ("after", 1.5), ("patience", 0)])
def test_stop_rule_refuses_what_cannot_work(option, value):
    with pytest.raises(ConfigError, match=f"sweep.stop.{option}={value}"):
        StopRule(**{option: value})


# ---------------------------------------------------------------- runs


ARM = Arm(width=32, loglr=-7.0, seed=3, planned_steps=30, batch_size=64, parameters=1000)


def run_with(folder, outcome, options=None):
    """Runs an arm whose training returns, or raises, ``outcome``; the number of times it was trained."""
    calls = []

    def train(hooks):
        calls.append(hooks)
        write_curve(folder, [0.5, 0.3, 0.2])
        (folder / "config.json").write_text(json.dumps(options or {"a": 1}))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return run_arm(folder, ARM, train, options=options or {"a": 1}, rule=StopRule()), len(calls)


def test_finished_run_is_not_trained_again(tmp_path):
    done = FitResult(30, {LOSS: 0.125}, tmp_path)
    first, trained = run_with(tmp_path, done)
    again, retrained = run_with(tmp_path, done)
    assert (trained, retrained) == (1, 0)
    assert again == first
    assert (again.loss, again.steps, again.curve[-1]) == (0.125, 30, (30, 0.2))
    saved = json.loads((tmp_path / RESULT).read_text())
    assert saved["seed"] == 3
    assert "git_revision" in saved


@pytest.mark.parametrize("error", [NonFiniteError("loss is NaN"), Diverged("loss above 1.5 times the best run's")])
def test_diverged_run_has_an_infinite_loss_and_the_steps_it_ran(tmp_path, error):
    result, _ = run_with(tmp_path, error)
    assert result.loss == math.inf
    assert result.steps == 30
    assert result.stopped
    assert read_arm(tmp_path) == result
    assert json.loads((tmp_path / RESULT).read_text())["result"]["loss"] is None


def test_run_stopped_by_a_signal_leaves_no_result(tmp_path):
    folder = tmp_path / "one"
    result, _ = run_with(folder, FitResult(10, {}, folder, stopped_early=True))
    assert result is None
    assert read_sweep(tmp_path) == ([], [folder])


def test_other_options_in_the_same_folder_are_refused(tmp_path):
    run_with(tmp_path, FitResult(30, {LOSS: 0.1}, tmp_path))
    with pytest.raises(ConfigError, match="other values of a.*another run_dir"):
        run_with(tmp_path, FitResult(30, {LOSS: 0.1}, tmp_path), {"a": 2})


def test_damaged_result_is_named(tmp_path):
    (tmp_path / RESULT).write_text('{"result": {}}')
    with pytest.raises(CheckpointError, match="arm.json.*delete it"):
        read_arm(tmp_path)


def test_siblings_differ_in_the_swept_options_only(tmp_path):
    options = {"mup": {"loglr": -7}, "run_dir": "a", "heads": 2}
    for name, other in {
        "a": options,
        "b": {"mup": {"loglr": -6}, "run_dir": "b", "heads": 2},
        "c": {"mup": {"loglr": -6}, "run_dir": "c", "heads": 4},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(other))
    assert siblings(tmp_path / "a", options, ("mup.loglr", "run_dir")) == [tmp_path / "b"]
    assert flat(options) == {"mup.loglr": -7, "run_dir": "a", "heads": 2}


def test_results_survive_json_and_become_csv_without_infinities():
    results = [arm_result(curve=((10, 0.5), (20, None))), arm_result(loss=math.inf, settings={"warmup": 0.1})]
    found = json.loads(to_json(results, {"note": 1}))
    assert [ArmResult.from_dict(run) for run in found["runs"]] == results
    lines = to_csv(results).splitlines()
    assert lines[0].endswith("stopped,warmup")
    assert lines[2].split(",")[3] == ""


def test_repeated_rows_come_in_whole_passes():
    held_out = build_dataset("digits", "validation", size=8, channels=1)
    repeated = Repeated(held_out, 3)
    assert len(repeated) == 3 * 261
    rows = repeated.fetch(torch.tensor([0, 261, 523]).numpy())
    assert torch.equal(rows["image"][0], rows["image"][1])
    assert torch.equal(rows["image"][2], held_out.fetch([1])["image"][0])


def test_figure_is_drawn_with_diverged_runs():
    rows = {"muP": MUP, "SP": {**SP, 128: {**SP[128], -4: math.inf}}}
    figure = transfer_figure(rows, {label: find_transfer(by_width) for label, by_width in rows.items()})
    assert figure.light_png.startswith(b"\x89PNG")
    assert figure.light_png != figure.dark_png
