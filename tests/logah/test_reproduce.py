"""The reproduction: its checks can fail, and it runs, ends and continues as it should."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from common.report.command import exit_code
from common.report.section_folder import load_section
from common.reproduction.run import reproduce
from logah.checkpoints import load_hypernetwork
from logah.reproduce import REPRODUCTION, main, plan
from logah.reproduction.checks import language_checks, size_check, vision_checks
from logah.reproduction.data import data_of
from logah.reproduction.finetuning import score_of, train_from
from logah.reproduction.runs import Run, by_rate, difference_at, mean_at, runs_of, steps_to_reach
from logah.reproduction.settings import (
    FULL,
    GHN3,
    LANGUAGE,
    LOGAH,
    LOGAH_LM,
    LOWRANK_V2,
    RANDOM,
    SMALL,
    VISION,
    Settings,
    Space,
    nets,
)
from logah.reproduction.starts import architecture, build_start
from logah.reproduction.training import train_config

TINY = dataclasses.replace(
    SMALL,
    arms=tuple(
        dataclasses.replace(arm, steps=3, first_steps=min(arm.first_steps, 2), orders=2 if arm is LOGAH else 1)
        for arm in (LOGAH, LOGAH_LM, GHN3, LOWRANK_V2)
    ),
    vision_space=Space(depths=(1,), widths=(16,), heads=(2,)),
    language_space=Space(depths=(1,), widths=(16,), heads=(2,)),
    hid=16,
    lora_r=4,
    vision_batch=256,
    language_batch=2,
    held_out_blocks=4,
    epochs=1,
    vision_nets=nets((2, 16, 2)),
    zero_shot_nets=nets((1, 16, 2), (2, 56, 4)),
    language_nets=nets((1, 24, 2)),
    language_steps=(0, 1, 2),
    language_more=(3,),
    language_longer=(("1x24", 3e-3),),
    early_step=1,
)


# ---------------------------------------------------------------- settings and plan


def test_settings_survive_json():
    for settings in (SMALL, FULL, TINY):
        assert Settings.from_dict(json.loads(json.dumps(settings.as_dict()))) == settings


def test_unseen_nets_are_deeper_or_wider_than_any_in_training():
    for settings in (SMALL, FULL):
        for kind in (VISION, LANGUAGE):
            space = settings.space_of(kind)
            for net in settings.nets_of(kind):
                assert net.depth > max(space.depths) or net.width > max(space.widths)


def test_plan_trains_every_arm_and_every_start_per_seed(tmp_path: Path):
    jobs = plan(FULL, [0, 1, 2], tmp_path, "revision")
    listed = [job.name for job in jobs]
    assert len(set(listed)) == len(listed)
    assert sum(name.startswith("train-") for name in listed) == 3 * len(FULL.arms)
    assert all(need in listed for job in jobs for need in job.needs)
    for kind in (VISION, LANGUAGE):
        for start in (RANDOM, *(arm.name for arm in FULL.arms_of(kind))):
            runs = sum(name.startswith(f"start-{start}-{kind}-") for name in listed)
            assert runs == 3 * len(FULL.nets_of(kind)) * FULL.orders_of(start, kind)


def test_random_starts_have_the_data_orders_of_every_other_start():
    assert SMALL.orders_of(RANDOM, VISION) == max(arm.orders for arm in SMALL.arms_of(VISION))


def test_hypernetworks_are_those_of_the_paper_at_small_size(tmp_path: Path):
    config = train_config(SMALL, LOGAH, seed=0, run_dir=str(tmp_path))
    assert config.precision == "fp32" and config.model["normalisation"] == "fan_in"
    assert config.model["class_token_noise"] == SMALL.class_token_noise > 0
    assert config.training.steps == LOGAH.steps and config.optim.lr == LOGAH.lr
    dense = train_config(SMALL, GHN3, seed=0, run_dir=str(tmp_path))
    assert dense.model["decoder"] == "dense" and (dense.model["hid"], dense.model["layers"]) == (32, 2)
    language = train_config(SMALL, LOGAH_LM, seed=0, run_dir=str(tmp_path))
    assert language.data.kind == "lm" and language.nets.family == "gpt2"
    for made in (config, dense, language):
        made.model_config(num_classes=10)


# ---------------------------------------------------------------- runs


def vision_runs(start: float, end: float, orders: int = 3) -> list[Run]:
    """Runs of all nets and rates around these accuracies."""
    return [
        Run(net.label, lr, order, (0, 1, 2, 3), (start, (start + end) / 2, end, end + 0.01 * (order - 1)))
        for net in SMALL.vision_nets
        for lr in SMALL.vision_lrs
        for order in range(orders)
    ]


def language_runs(start: float, early: float, late: float = 3.9) -> list[Run]:
    """Runs of all nets and rates with these losses; a higher rate is a little better."""
    points = (0, 50, 100)
    return [
        Run(net.label, lr, 0, points, (start, early - 10 * lr, late - 10 * lr))
        for net in SMALL.language_nets
        for lr in SMALL.language_lrs
    ]


def test_differences_are_paired_by_net_rate_and_order():
    base = vision_runs(0.1, 0.5)
    better = [dataclasses.replace(run, scores=tuple(score + 0.2 for score in run.scores)) for run in base]
    found = difference_at(better[::-1], base, 3)
    assert found.value == pytest.approx(0.2) and found.standard_error == pytest.approx(0.0, abs=1e-12)
    assert difference_at([run for run in better if run.order == 0], base, 3).value == pytest.approx(0.2)
    assert mean_at(base, 3).standard_error > 0


def test_runs_of_other_length_do_not_enter_a_mean():
    short, long = Run("a", 1e-3, 0, (0, 50), (6.0, 5.0)), Run("a", 3e-3, 0, (0, 50, 300), (6.0, 4.8, 3.7))
    assert mean_at([short, long], 300).value == 3.7
    assert list(by_rate([short, long], "a", 300)) == [3e-3]


def test_learning_rates_are_no_repetitions_before_training():
    runs = [Run(net, lr, 0, (0, 1), (start, 0.5)) for net, start in (("a", 0.1), ("b", 0.3)) for lr in (1e-3, 3e-3)]
    found = mean_at(runs, 0)
    assert found.value == pytest.approx(0.2) and found.standard_error == pytest.approx(0.1)
    assert difference_at([run for run in runs if run.net == "a"], runs, 0).standard_error is None


def test_steps_to_a_loss_are_interpolated():
    run = Run("a", 1e-3, 0, (0, 50, 100), (6.0, 5.0, 4.0))
    assert steps_to_reach(run, 4.5) == pytest.approx(75)
    assert steps_to_reach(run, 7.0) == 0 and steps_to_reach(run, 3.0) is None


# ---------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("logah", "passed"),
    [((0.28, 0.74), [True, True]), ((0.17, 0.74), [False, True]), ((0.28, 0.58), [True, False])],
)
def test_vision_is_judged_before_and_after_training(logah: tuple[float, float], passed: list[bool]):
    found = vision_checks(SMALL, vision_runs(*logah), vision_runs(0.1, 0.508))
    assert [check.passed for check in found] == passed


@pytest.mark.parametrize(
    ("start", "early", "passed"),
    [(4.7, 4.0, [True, True, True]), (5.6, 4.0, [False, True, True]), (4.7, 4.6, [True, False, False])],
)
def test_language_is_judged_at_the_start_and_early(start: float, early: float, passed: list[bool]):
    found = language_checks(SMALL, language_runs(start, early), language_runs(6.26, 4.75))
    assert [check.passed for check in found] == passed


def test_every_start_is_judged_at_its_best_rate():
    def diverged(runs: list[Run], at: float) -> list[Run]:
        return [dataclasses.replace(run, scores=(run.scores[0], 9.0, 9.0)) if run.lr == at else run for run in runs]

    low, high = min(SMALL.language_lrs), max(SMALL.language_lrs)
    logah, random = diverged(language_runs(4.7, 4.0), high), diverged(language_runs(6.26, 4.75), low)
    assert [check.passed for check in language_checks(SMALL, logah, random)] == [True, True, True]
    random = diverged(diverged(language_runs(6.26, 4.35), low), 0.0)
    assert [check.passed for check in language_checks(SMALL, logah, random)] == [True, False, False]


def test_size_is_judged_by_parameters():
    assert size_check(264_432, 1_460_000).passed and not size_check(264_432, 500_000).passed


# ---------------------------------------------------------------- nets from random starts


def test_random_starts_are_equal_for_equal_seeds_only():
    first, again, other = (build_start(TINY, VISION, TINY.vision_nets[0], seed, None) for seed in (1, 1, 2))
    name = "conv_proj.weight"
    assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def test_nets_have_no_dropout():
    for kind in (VISION, LANGUAGE):
        network = architecture(SMALL, kind, TINY.nets_of(kind)[0]).build()
        rates = {module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)}
        assert rates <= {0.0}


def test_scores_are_those_of_the_whole_held_out_data():
    data = data_of(TINY, LANGUAGE, 0)
    network = build_start(TINY, LANGUAGE, TINY.language_nets[0], 0, None)
    assert len(data.test) == 4
    assert score_of(network, data) == pytest.approx(math.log(TINY.vocab_size), abs=0.2)


def test_training_from_a_start_scores_every_point():
    found = train_from(TINY.as_dict(), LANGUAGE, RANDOM, "1x24", 0, 0, None)["curves"]
    assert [curve["lr"] for curve in found] == list(TINY.language_lrs)
    assert [len(curve["scores"]) for curve in found] == [len(curve["points"]) for curve in found]
    assert max(found[-1]["points"]) == 3 and max(found[0]["points"]) == 2  # the run that goes on
    assert len({curve["scores"][0] for curve in found}) == 1  # all rates start from the same weights


# ---------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny reproduction: trains hypernetworks through the engine, predicts, trains from predictions, reports."""
    output = tmp_path_factory.mktemp("reproduction") / "logah"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.reproduction.run.source_revision", lambda *_: "0" * 64)
        assert reproduce(REPRODUCTION, output, TINY, [0], processes=0) is False  # so few steps reach no threshold
    return output


def test_tiny_reproduction_writes_every_table_and_figure(finished: Path):
    files = {path.name for path in finished.iterdir() if path.is_file()}
    for stem in ("vision_means", "vision", "zero_shot", "language", "crossover", "hypernetworks", "checks"):
        assert f"{stem}.csv" in files
    for stem in ("vision", "zero_shot", "language", "training"):
        assert {f"{stem}.png", f"{stem}-dark.png"} <= files
    section = load_section(finished)
    assert len(section.checks) == 2 + 1 + len(TINY.language_nets) + 1
    assert str(finished) not in (finished / "section.html").read_text()


def test_every_start_sees_its_own_weights_and_the_same_points(finished: Path):
    results = json.loads((finished / "results.json").read_text())["values"]["results"]
    random, logah, ghn3 = (runs_of(TINY, results, start, VISION, 0) for start in (RANDOM, LOGAH.name, GHN3.name))
    assert len(random) == len(logah) == 2 * len(ghn3) == 2 * len(TINY.vision_lrs)
    assert {run.points for run in random + logah + ghn3} == {(0, 1)}
    assert {run.cell for run in ghn3} < {run.cell for run in logah} == {run.cell for run in random}


def test_hypernetworks_stay_and_predictions_have_no_noise(finished: Path):
    (run,) = (finished / "runs").glob("logah-seed0-*")
    config = load_hypernetwork(run).config
    assert config.class_token_noise == TINY.class_token_noise
    first, again = (build_start(TINY, VISION, TINY.vision_nets[0], 1, str(run)) for _ in range(2))
    table = first.encoder.pos_embedding
    assert torch.equal(table, again.encoder.pos_embedding) and torch.count_nonzero(table[0, 0]) == 0
    random = build_start(TINY, VISION, TINY.vision_nets[0], 1, None)
    assert not torch.equal(first.conv_proj.weight, random.conv_proj.weight)
    assert torch.equal(first.class_token, random.class_token)  # no prediction covers it


def test_second_run_reuses_everything(finished: Path, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr("common.reproduction.run.source_revision", lambda *_: "0" * 64)
    reproduce(REPRODUCTION, finished, TINY, [0], processes=0)
    assert capsys.readouterr().out.count("(kept)") == len(plan(TINY, [0], finished, "any"))


def test_several_seeds_reach_the_section(finished: Path):
    results = json.loads((finished / "results.json").read_text())["values"]["results"]
    both = results | {name.replace("-seed0", "-seed1"): result for name, result in results.items()}
    section = REPRODUCTION.build_section(TINY, [0, 1], both, {})
    assert "seeds" in [table.name for table in section.tables]
    assert sum("(seed 1)" in check.claim for check in section.checks) == len(section.checks) / 2


def test_command_refuses_what_cannot_work(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["reproduce", "--output", str(tmp_path)])
    assert exit_code(main) == 2
    assert "not empty" in capsys.readouterr().err
