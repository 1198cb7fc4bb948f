"""What a comparison says: means, the best rate, steps until as good, who is overtaken."""

import math

import numpy as np
import pytest

from logah.finetune_report import (
    best_curves,
    comparison_table,
    curve_figure,
    curves_of,
    first_step_at_least_as_good,
    overtaken,
)
from logah.finetuning import Finetuned, RunKey, RunResult
from logah.starts import Start

RANDOM, LOGAH = Start("random", "random"), Start("logah", "hypernetwork", "x")


def run(start: Start, seed: int, lr: float, losses: list[float], *, diverged: bool = False) -> RunResult:
    points = [(50 * place, {"loss": value}) for place, value in enumerate(losses)]
    return RunResult(RunKey(start, seed, lr), points, {"loss": losses[-1]}, diverged=diverged)


@pytest.fixture
def found() -> Finetuned:
    """The prediction leads at first and is overtaken at step 150; the large rate diverges for one seed."""
    return Finetuned("lm", 10, [
        run(RANDOM, 0, 1e-3, [6.2, 5.0, 4.4, 3.8]), run(RANDOM, 1, 1e-3, [6.4, 5.2, 4.6, 3.6]),
        run(RANDOM, 0, 1e-2, [6.2, 4.0, 3.0, 2.5]), run(RANDOM, 1, 1e-2, [6.4, 5.0], diverged=True),
        run(LOGAH, 0, 1e-3, [4.7, 4.1, 4.0, 3.9]), run(LOGAH, 1, 1e-3, [4.7, 4.1, 4.0, 3.9]),
    ])  # fmt: skip


def test_curves_are_means_with_standard_errors_over_the_seeds(found):
    curve = curves_of(found)[0]
    np.testing.assert_allclose(curve.mean_S, [6.3, 5.1, 4.5, 3.7])
    np.testing.assert_allclose(curve.error_S, [0.1, 0.1, 0.1, 0.1])
    assert curve.test == pytest.approx((3.7, 0.1)) and curve.num_seeds == 2


def test_a_rate_at_which_a_seed_diverged_is_never_the_best(found):
    curves = curves_of(found)
    assert [curve.label for curve in curves] == ["random", "random", "logah"]
    assert math.isnan(curves[1].final)
    assert [(curve.label, curve.lr) for curve in best_curves(curves, False)] == [("random", 1e-3), ("logah", 1e-3)]
    assert best_curves(curves[1:2], False) == [curves[1]]


def test_the_crossover_is_told(found):
    curves = curves_of(found)
    random, logah = curves[0], curves[2]
    assert overtaken(logah, random, False) == 150
    assert overtaken(random, logah, False) is None
    assert first_step_at_least_as_good(logah, 4.5, False) == 50
    assert first_step_at_least_as_good(logah, 3.7, False) is None
    table = comparison_table(found, curves)
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows["logah"]["overtaken at"] == 150 and rows["logah"]["steps to random"] is None
    assert rows["random"]["overtaken at"] is None and rows["random"]["last"] == pytest.approx(3.7)


def test_one_start_needs_no_columns_of_comparison_and_figures_are_drawn(found):
    alone = Finetuned("lm", 10, found.runs[:2])
    table = comparison_table(alone, curves_of(alone))
    assert table.columns[-1] == "test error" and "overtaken" not in table.caption
    figure = curve_figure(found, curves_of(found))
    assert figure.light_png.startswith(b"\x89PNG") and "2 seeds" in figure.caption


def test_more_is_better_for_accuracy():
    vision = [RunResult(RunKey(RANDOM, 0, lr), [(0, {"top1": 0.1}), (5, {"top1": value})]) for lr, value in
              ((1e-3, 0.5), (1e-2, 0.7))]  # fmt: skip
    found = Finetuned("vision", 5, vision)
    assert best_curves(curves_of(found), True)[0].lr == 1e-2
