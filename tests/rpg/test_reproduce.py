"""The reproduction: its checks can fail, and it runs, ends and continues as it should."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from common.report.command import exit_code
from common.report.section_folder import load_section
from common.reproduction.run import reproduce
from rpg.loading import load_generator
from rpg.reproduce import REPRODUCTION, main, plan
from rpg.reproduction import names
from rpg.reproduction.checks import evaluations_check, novelty_checks, quality_checks, state_checks, task_checks
from rpg.reproduction.collection import read_all, unseen_folder
from rpg.reproduction.scoring import MEAN, ORIGINALS, noise_name
from rpg.reproduction.settings import (
    CONDITIONAL,
    FULL,
    GATED_LAST,
    NO_STATE,
    RESIDUAL,
    SMALL,
    STATE_PER_FILE,
    STATES,
    UNCONDITIONAL,
    Draw,
    Settings,
)
from rpg.reproduction.tasks import SEEN, UNSEEN, tasks_to_draw
from rpg.reproduction.training import train_config
from rpg.tasks import HELD_OUT_TASKS
from rpg.testing import TesterSection, build_tester

FEW = Draw(name="few", steps=4, networks=3)


def short(arm, *draws: Draw):
    """The arm trained for a few steps."""
    return dataclasses.replace(arm, steps=4, draws=draws or (FEW,))


TINY = dataclasses.replace(
    SMALL,
    epochs=1,
    checkpoints=6,
    checkpoints_each=3,
    trainings=2,
    seen=8,
    unseen=22,
    drawn_tasks=6,
    task_steps=5,
    noised=3,
    pairs=3,
    dim_per_token=64,
    d_state=8,
    channels=(1, 2, 4, 2, 1),
    d_condition=8,
    arms=tuple(map(short, (UNCONDITIONAL, RESIDUAL, STATES, NO_STATE, CONDITIONAL))),
)


# ---------------------------------------------------------------- settings and plan


def test_settings_survive_json():
    for settings in (SMALL, FULL, TINY):
        assert Settings.from_dict(json.loads(json.dumps(settings.as_dict()))) == settings


def test_plan_trains_every_arm_per_seed_and_collects_once(tmp_path: Path):
    jobs = plan(FULL, [0, 1, 2], tmp_path, "revision")
    listed = [job.name for job in jobs]
    assert len(set(listed)) == len(listed)
    assert sum(name.startswith("collect-") for name in listed) == sum(n.startswith("baselines-") for n in listed) == 3
    assert sum(name.startswith("train-") for name in listed) == 3 * len(FULL.arms)
    assert all(need in listed for job in jobs for need in job.needs)


def test_generators_are_those_of_the_paper_at_small_size(tmp_path: Path):
    config = train_config(SMALL, SMALL.arm("tasks"), seed=0, run_dir=str(tmp_path), folder="checkpoints")
    assert (config.precision, config.training.n_iters, config.training.ema) == ("fp32", 1500, None)
    assert (config.optim.lr, config.optim.schedule, config.optim.weight_decay) == (2e-3, "cosine", 0)
    assert config.model["condition"] == "full" and config.data.normalisation == "residual"
    assert config.effective_states == "none"
    states = train_config(SMALL, SMALL.arm("states"), seed=0, run_dir=str(tmp_path), folder="checkpoints")
    assert states.effective_states == "groups" and states.data.normalisation == "layer"
    gated = train_config(FULL, FULL.arm("tasks-gated8"), seed=0, run_dir=str(tmp_path), folder="checkpoints")
    assert gated.model["gate"] == () and FULL.arm("tasks-gated").gate == ("*",)


# ---------------------------------------------------------------- checks


def group(accuracy: float, similarity: float = 0.7, distance: float = 0.4, apart: float = 0.5) -> dict:
    """Scores of three networks around these means."""
    return {
        "accuracy": [accuracy - 0.002, accuracy, accuracy + 0.002],
        "similarity": [similarity - 0.01, similarity, similarity + 0.01],
        "distance": [distance, distance, distance],
        "apart": apart,
    }


BASELINES = {
    ORIGINALS: group(0.963, 0.95, 0.016),
    noise_name(0.02): group(0.9597, 0.898),
    noise_name(0.05): group(0.958, 0.792),
    noise_name(0.1): group(0.9484, 0.608),
    MEAN: group(0.125),
}


def test_quality_is_judged_by_mean_and_worst_network():
    def passed(accuracy: list[float]) -> list[bool]:
        return [each.passed for each in quality_checks({"accuracy": accuracy}, BASELINES[ORIGINALS], "label")]

    assert passed([0.96, 0.97]) == [True, True]
    assert passed([0.94, 0.99]) == [True, False]
    assert passed([0.955, 0.955]) == [False, True]


@pytest.mark.parametrize(
    ("drawn", "failed"),
    [
        (group(0.9651, 0.735), []),
        (group(0.9651, 0.735, distance=0.04), [0]),  # a copy
        (group(0.9651, 0.735, apart=0.0), [1]),  # always the same network
        (group(0.9651, 0.93), [2, 3]),  # errs like an original, and is read beyond the noise curve
        (group(0.9540, 0.735), [3]),  # no better than noise
    ],
)
def test_novelty_is_judged_by_distance_errors_and_noise(drawn: dict, failed: list[int]):
    baselines = {**BASELINES, noise_name(0.02): group(0.9660, 0.898)}
    checks = novelty_checks(SMALL, drawn, baselines, 0.016)
    assert [index for index, check in enumerate(checks) if not check.passed] == failed


def test_few_steps_must_be_as_accurate_as_the_full_chain_and_much_cheaper():
    few, many = Draw(name="few"), Draw(name="many", kind="ddpm", steps=1000)

    def passed(accuracy: float, steps: int = 50) -> bool:
        return evaluations_check(
            dataclasses.replace(few, steps=steps), many, {"few": group(accuracy), "many": group(0.965)}
        ).passed

    assert passed(0.9655) and passed(0.964)
    assert not passed(0.95)
    assert not passed(0.9655, steps=100)


def test_states_must_help_and_averages_must_not():
    def passed(with_states: float, without: float, mean: float = 0.125) -> list[bool]:
        baselines = {**BASELINES, MEAN: group(mean)}
        return [each.passed for each in state_checks(group(with_states), group(without), baselines)]

    assert passed(0.961, 0.108) == [True, True, True]
    assert passed(0.94, 0.5, 0.6) == [False, False, False]


def test_tasks_are_judged_by_accuracy_majority_and_another_task():
    def passed(accuracy: float, other: float, majority: float = 0.624) -> list[bool]:
        scores = {"accuracy": [accuracy] * 20, "other_task": [other] * 20, "majority": [majority] * 20}
        return [each.passed for each in task_checks({UNSEEN: scores})]

    assert passed(0.935, 0.472) == [True, True, True]
    assert passed(0.91, 0.7, 0.92) == [False, False, False]


# ---------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny reproduction: collects, trains through the engine, generates, scores, reports."""
    output = tmp_path_factory.mktemp("reproduction") / "rpg"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.reproduction.run.source_revision", lambda *_: "0" * 64)
        assert reproduce(REPRODUCTION, output, TINY, [0], processes=0) is False  # so few steps reach no threshold
    return output


def test_tiny_reproduction_writes_every_table_and_figure(finished: Path):
    files = {path.name for path in finished.iterdir() if path.is_file()}
    for stem in ("samplers", "states", "tasks", "task_distances", "collections", "generators", "checks"):
        assert f"{stem}.csv" in files
    for stem in ("similarity", "samplers", "states", "tasks", "training"):
        assert {f"{stem}.png", f"{stem}-dark.png"} <= files
    section = load_section(finished)
    assert len(section.checks) == 2 * (2 + 4) + 3 + 3
    assert str(finished) not in (finished / "section.html").read_text()


def test_collections_are_folders_as_a_user_would_bring_them(finished: Path):
    folder = next((finished / "checkpoints").glob("seeds-*"))
    assert [(name.seed, name.index) for name, _ in read_all(folder)] == [(s, n) for s in (0, 1) for n in (1, 2, 3)]
    tester = build_tester(TesterSection(kind="python", target="rpg.zoo.digits:DigitTester"))
    path = next(folder.glob("*.safetensors"))
    assert tester.test(path).accuracy == pytest.approx(float(path.name.split("acc")[1][:6]), abs=5e-5)


def test_unseen_tasks_are_held_out_of_what_the_generator_learns_from(finished: Path):
    folder = next(path for path in (finished / "checkpoints").glob("tasks-*") if path.suffix == "" and path.is_dir())
    folder = folder.with_name(folder.name.removesuffix("-unseen"))
    seen = {name.task for name, _ in read_all(folder)}
    unseen = {name.task for name, _ in read_all(unseen_folder(folder))}
    assert (len(seen), len(unseen)) == (8, 22) and not seen & unseen and set(HELD_OUT_TASKS) <= unseen
    drawn = tasks_to_draw(TINY, str(folder), 0)
    assert set(drawn[SEEN]) <= seen and set(drawn[UNSEEN]) <= unseen
    run = next((finished / "runs").glob("tasks-*"))
    assert set(load_generator(run).facts.tasks) == seen


def test_scores_of_originals_compare_with_the_others(finished: Path):
    results = json.loads((finished / "results.json").read_text())["values"]["results"]
    originals = results[names.baselines("digits", 0)][ORIGINALS]
    assert len(originals["accuracy"]) == 6
    assert min(originals["distance"]) > 0 and max(originals["similarity"]) <= 1


def test_second_run_reuses_everything(finished: Path, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr("common.reproduction.run.source_revision", lambda *_: "0" * 64)
    reproduce(REPRODUCTION, finished, TINY, [0], processes=0)
    assert capsys.readouterr().out.count("(kept)") == len(plan(TINY, [0], finished, "any"))


def test_arms_of_the_full_run_and_seeds_reach_the_section(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("common.reproduction.run.source_revision", lambda *_: "0" * 64)
    arms = tuple(map(short, (UNCONDITIONAL, STATES, NO_STATE, STATE_PER_FILE, CONDITIONAL, GATED_LAST)))
    settings = dataclasses.replace(TINY, arms=tuple(dataclasses.replace(arm, steps=1) for arm in arms))
    reproduce(REPRODUCTION, tmp_path / "out", settings, [0, 1], processes=0)
    section = load_section(tmp_path / "out")
    assert "seeds" in [table.name for table in section.tables]
    assert sum("(seed 1)" in check.claim for check in section.checks) == 12
    states = next(table for table in section.tables if table.name == "states")
    assert any(row[0].startswith("one state per checkpoint") for row in states.rows)


def test_generators_of_different_seeds_differ_and_share_checkpoints(finished: Path):
    jobs = {job.name: job for job in plan(TINY, [3, 4], finished, "r" * 8)}
    one, other = (jobs[f"train-digits-seed{seed}"].arguments for seed in (3, 4))
    assert one["folder"] == other["folder"] and one["run_dir"] != other["run_dir"]
    assert jobs["collect-digits-seed3"].arguments["folder"] == one["folder"]


def test_command_refuses_what_cannot_work(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["reproduce", "--output", str(tmp_path)])
    assert exit_code(main) == 2
    assert "not empty" in capsys.readouterr().err
