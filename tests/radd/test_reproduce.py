"""The reproduction: its statistics are right, its checks can fail, and it continues where it was stopped."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from common.report.command import exit_code
from common.report.section_folder import load_section
from common.reproduction.run import claim, seeds
from common.reproduction.run import reproduce as run_reproduction
from common.seeding import generator
from radd.bound import t_dce_excess
from radd.losses import build_order, ordered_nll
from radd.model import RADD, ModelConfig
from radd.reproduce import REPRODUCTION, main, plan
from radd.reproduction.checks import bound_checks, calls_check, joint_deviation, precision_checks
from radd.reproduction.sampling import tail_share, zipf
from radd.reproduction.scoring import mean_and_error, ngram_nll, nll_by_count, order_nll, range_terms, unigram_nll
from radd.reproduction.settings import FULL, SMALL, Settings

TINY = dataclasses.replace(
    SMALL,
    length=16,
    hidden_size=16,
    n_blocks=1,
    n_heads=2,
    steps=8,
    batch_size=4,
    warmup=2,
    test_sequences=8,
    draws=3,
    orders=2,
    nfe_steps=(4, 8),
    nfe_rows=4,
    zipf_tokens=100,
    zipf_length=4,
    zipf_steps=16,
    zipf_rows=2,
)


# ---------------------------------------------------------------- statistics


def test_standard_error_is_that_of_the_draws_not_of_the_sequences():
    rng = np.random.default_rng(0)
    easy_and_hard_B = np.linspace(0, 50, 64)
    means, errors = [], []
    for _ in range(400):
        mean, error, deviation = mean_and_error(easy_and_hard_B + rng.normal(0, 2, size=(8, 64)))
        means.append(mean)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
    assert deviation == pytest.approx(2, rel=0.1)


def test_nll_by_count_averages_and_interpolates():
    masked_MB = np.array([[1, 1, 4]])
    np.testing.assert_allclose(nll_by_count(np.array([[1.0, 3.0, 8.0]]), masked_MB, 4), [2, 4, 6, 8])


def test_range_terms_are_those_of_the_levels_left_out():
    nll_k = np.linspace(2.0, 4.0, 64)
    terms = range_terms(nll_k)
    assert terms["lambda_DCE"] == terms["k_DCE"] == 0
    # To first order, delta * (bound - NLL with one masked - NLL with all masked); specification section 3.4.
    assert terms["t_DSE"] == pytest.approx(1e-3 * (nll_k.mean() - nll_k[0] - nll_k[-1]), rel=0.05)
    assert terms["t_DCE"] - terms["t_DSE"] == pytest.approx(t_dce_excess())


def test_order_steps_sum_to_the_order_likelihood():
    torch.manual_seed(0)
    model = RADD(ModelConfig(hidden_size=16, n_blocks=1, n_heads=2, length=6, dropout=0.0), 10).eval()
    torch.nn.init.normal_(model.output_layer.linear.weight)
    x_BL = torch.randint(0, 10, (3, 6), generator=generator(0, "test"))
    order_BL = build_order("ar_random", 3, 6, generator=generator(1, "test"))
    whole_B = ordered_nll(lambda tokens, where: model(tokens, where=where), x_BL, order_BL, mask_id=10)
    np.testing.assert_allclose(order_nll(model, x_BL, order_BL).sum(axis=1), whole_B.numpy(), rtol=1e-5)


def test_ngram_baselines_improve_on_the_unigram_and_normalise():
    text = np.frombuffer(b"the cat sat on the mat and the dog sat on the log " * 12, dtype=np.uint8).astype(np.int64)
    train, test = text[:480].reshape(-1, 32), text[480:576].reshape(-1, 32)
    unigram = unigram_nll(train, test)
    assert ngram_nll(train, test, 3) < ngram_nll(train, test, 2) < unigram < math.log(128)
    ones = [ngram_nll(train, np.array([[116, 104, token]]), 3) * 3 for token in range(128)]
    prefix = ngram_nll(train, np.array([[116, 104]]), 3) * 2
    assert sum(math.exp(prefix - one) for one in ones) == pytest.approx(1)


def test_zipf_entropy_is_the_specifications():
    p_N = zipf(8000)
    assert float(-(p_N * p_N.log()).sum()) == pytest.approx(6.473, abs=1e-3)
    assert float(p_N[1000:].sum()) == pytest.approx(0.217, abs=1e-3)


def test_two_stage_draws_keep_the_tail_and_one_stage_counts_alike():
    settings = dataclasses.replace(TINY, zipf_tokens=4000, zipf_length=24, zipf_steps=512, zipf_rows=2).as_dict()
    fair = tail_share("two-stage", 0, settings)
    assert abs(fair["share"] - fair["true_share"]) < 3 * fair["error"]
    assert fair["tokens"] == 2 * 40 * 24
    assert tail_share("float64", 0, TINY.as_dict())["tokens"] == 2 * 4


# ---------------------------------------------------------------- checks


def cell(mean: float, error: float = 0.01, term: float = 0.0) -> dict:
    return {"mean": mean, "error": error, "deviation": 1.0, "range": term}


def row(**means: float) -> dict:
    return {"cells": {name: cell(mean) for name, mean in means.items()}}


def test_bound_checks_find_a_large_cell_and_a_disagreement():
    good = row(t_DSE=2.5, t_DCE=2.51, lambda_DCE=2.5, k_DCE=2.49)
    assert all(check.passed for check in bound_checks({"k_DCE": good}))
    large = bound_checks({"k_DCE": row(t_DSE=2.66, t_DCE=2.66, lambda_DCE=2.65, k_DCE=2.65)})
    assert [check.passed for check in large] == [False, True]
    apart = bound_checks({"k_DCE": row(t_DSE=2.5, t_DCE=2.5, lambda_DCE=2.5, k_DCE=2.45)})
    assert [check.passed for check in apart] == [True, False]
    off = {"cells": good["cells"], "orders": {"random": {"mean": 2.4, "error": 0.001, "deviation": 0.1, "count": 4}}}
    assert [check.passed for check in bound_checks({"k_DCE": off})] == [True, True, False]


def test_estimators_are_compared_after_the_range_term():
    assert joint_deviation(cell(2.497, 0.001, -0.003), cell(2.5, 0.001)) == pytest.approx(0, abs=1e-9)
    assert joint_deviation(cell(2.5, 0.003), cell(2.51, 0.004)) == pytest.approx(2)


def test_calls_check_fails_at_three_deviations():
    point = {"steps": 64, "expected": 40.0, "deviation": 0.5, "measured": 41.4}
    exact = {"steps": 1, "expected": 1.0, "deviation": 0.0, "measured": 1.0}
    assert calls_check({"noise": "loglinear", "points": [point, exact]}).passed
    assert not calls_check({"noise": "loglinear", "points": [{**point, "measured": 41.6}]}).passed
    assert not calls_check({"noise": "loglinear", "points": [{**exact, "measured": 2.0}]}).passed


def test_precision_checks_want_fair_modes_fair_and_the_others_lower():
    def shares(**found: float) -> dict:
        names = {"two": "two-stage", "f64": "float64", "f32": "float32", "f16": "float16-compat"}
        return {names[k]: {"share": v, "true_share": 0.217, "error": 0.024} for k, v in found.items()}

    assert all(check.passed for check in precision_checks(shares(two=0.22, f64=0.20, f32=0.156, f16=0.153)))
    results = [check.passed for check in precision_checks(shares(two=0.22, f64=0.10, f32=0.22, f16=0.153))]
    assert results == [True, False, False, False]


# ---------------------------------------------------------------- the whole


def reproduce(output: Path, settings: Settings, run_seeds: list[int], *, processes: int) -> bool:
    return run_reproduction(REPRODUCTION, output, settings, run_seeds, processes=processes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny reproduction: trains all four losses through the engine, scores, samples, reports."""
    output = tmp_path_factory.mktemp("reproduction") / "radd"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "common.reproduction.run.source_revision", lambda *_: "0" * 64
        )  # sources may be edited while tests run
        assert reproduce(output, TINY, [0], processes=0) is False  # eight steps do not reach the limit
    return output


def test_tiny_reproduction_writes_every_table_and_figure(finished: Path):
    names = {path.name for path in finished.iterdir() if path.is_file()}
    for stem in ("loss_by_type", "bounds", "calls-loglinear", "precision"):
        assert {f"{stem}.png", f"{stem}-dark.png"} <= names
    for stem in ("bounds", "estimators", "calls-loglinear", "precision", "baselines", "checks"):
        assert f"{stem}.csv" in names
    assert {"results.json", "section.html"} <= names
    section = load_section(finished)
    assert [check.claim for check in section.checks if not check.passed] == [
        "every bound is below 2.65 nats per byte",
        *[check.claim for check in section.checks[1:] if not check.passed],
    ]
    assert section.facts["seeds"] == "0"
    found = json.loads((finished / "results.json").read_text())
    assert found["values"]["settings"]["steps"] == 8
    assert len(found["facts"]["revision"]) >= 7
    assert str(finished) not in (finished / "section.html").read_text()


def test_losses_with_equal_gradients_train_equal_networks(finished: Path):
    values = json.loads((finished / "results.json").read_text())["values"]["results"]
    dse, dce, k = (values[f"score-{loss}-seed0"]["cells"]["k_DCE"]["mean"] for loss in ("t_DSE", "t_DCE", "k_DCE"))
    assert dse == pytest.approx(dce, rel=1e-4)
    assert dse != pytest.approx(k, rel=1e-4)


def test_second_run_reuses_everything(finished: Path, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr("common.reproduction.run.source_revision", lambda *_: "0" * 64)
    reproduce(finished, TINY, [0], processes=0)
    printed = capsys.readouterr().out
    assert printed.count("(kept)") == len(plan(TINY, [0], finished, "any"))


def test_other_sources_are_not_mixed_with_kept_results(finished: Path):
    old, new = (plan(TINY, [0], finished, revision) for revision in ("0" * 64, "1" * 64))
    assert {job.name for job in old} == {job.name for job in new}
    assert all(a.fingerprint("0" * 64) != b.fingerprint("1" * 64) for a, b in zip(old, new))
    run_dirs = [{job.arguments["run_dir"] for job in jobs if job.name.startswith("train")} for jobs in (old, new)]
    assert not run_dirs[0] & run_dirs[1]


def test_seeds_and_geometric_noise_reach_the_section(tmp_path: Path):
    full = dataclasses.replace(
        TINY, loss_types=("t_DCE",), geometric_losses=("t_DCE",), ordered_losses=("t_DCE",), steps=4
    )
    reproduce(tmp_path / "radd", full, [0, 1], processes=0)
    section = load_section(tmp_path / "radd")
    tables = {table.name: table for table in section.tables}
    assert {"seeds", "calls-geometric", "calls-loglinear"} <= tables.keys()
    assert tables["baselines"].rows[0][0] == "unigram"
    assert tables["seeds"].rows[0][1] == 2
    assert sum("(seed 1)" in check.claim for check in section.checks) == 8
    assert any("geometric" in check.claim for check in section.checks)


def test_full_plan_has_more_seeds_and_baselines(tmp_path: Path):
    names = {job.name for job in plan(FULL, seeds(0, full=True), tmp_path, "revision")}
    assert {"train-t_DCE-geometric-seed0", "calls-geometric-seed0", "score-k_DCE-seed2"} <= names
    assert FULL.ngrams


def test_users_folder_is_refused_untouched(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        claim(tmp_path, "radd")
    monkeypatch.setattr(sys, "argv", ["reproduce", "--output", str(tmp_path)])
    assert exit_code(main) == 2
    monkeypatch.setattr(sys, "argv", ["reproduce", "--seed", "-1"])
    assert exit_code(main) == 2
    monkeypatch.setattr(sys, "argv", ["reproduce", "--processes", "0"])
    assert exit_code(main) == 2
    assert "--processes=0" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_killed_reproduction_leaves_no_worker_and_continues(tmp_path: Path, repo_root: Path):
    """SIGKILL to the parent while a worker trains; then the same call finishes and has lost nothing."""
    long = dataclasses.replace(TINY, steps=200, loss_types=("k_DCE",))
    script = (
        "import sys; from pathlib import Path; from radd.reproduce import REPRODUCTION; "
        "from common.reproduction.run import reproduce; from radd.reproduction.settings import Settings\n"
        "if __name__ == '__main__': "
        f"reproduce(REPRODUCTION, Path(sys.argv[1]), Settings(**{long.as_dict()!r}), [0], processes=1)"
    )
    path = tmp_path / "run.py"
    path.write_text(script)
    output = tmp_path / "radd"
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    parent = subprocess.Popen([sys.executable, str(path), str(output)], env=environment, cwd=repo_root)
    deadline = time.monotonic() + 120
    while not list(output.glob("runs/*/checkpoints/step_*")):
        assert time.monotonic() < deadline
        assert parent.poll() is None, "the reproduction ended early"
        time.sleep(0.02)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    (metrics,) = output.glob("runs/*/metrics.jsonl")
    time.sleep(1)
    size = metrics.stat().st_size
    time.sleep(0.5)
    assert metrics.stat().st_size == size, "an orphaned worker still trains"
    assert not (output / "results.json").exists()
    reproduce(output, long, [0], processes=0)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 201))
