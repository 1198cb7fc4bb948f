"""Inception Score: bounds, splits, processes."""

import numpy as np
import pytest

from common.errors import DataError
from mup_dit.metrics.inception_score import ScoreAccumulator


def score(logits: np.ndarray, split_size: int, batch: int = 7) -> ScoreAccumulator:
    accumulator = ScoreAccumulator(split_size)
    for start in range(0, len(logits), batch):
        accumulator.update(logits[start : start + batch], range(start, min(start + batch, len(logits))))
    return accumulator


def direct(logits: np.ndarray) -> float:
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return float(np.exp((p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1).mean()))


def test_score_is_the_mean_over_consecutive_splits():
    logits = np.random.default_rng(0).normal(size=(50, 6))
    found = score(logits, 20).finish()
    expected = [direct(logits[start : start + 20]) for start in (0, 20, 40)]
    assert found.value == pytest.approx(np.mean(expected), rel=1e-12)
    assert found.standard_error == pytest.approx(np.std(expected, ddof=1) / np.sqrt(3), rel=1e-9)


def test_score_lies_between_one_and_the_number_of_classes():
    assert score(np.zeros((30, 6)), 100).finish().value == pytest.approx(1.0)
    certain = 1e3 * np.eye(6)[np.arange(30) % 6]
    assert score(certain, 100).finish().value == pytest.approx(6.0)


def test_shares_of_two_processes_give_the_score_of_one():
    logits = np.random.default_rng(1).normal(size=(60, 4))
    parts = [ScoreAccumulator(25) for _ in range(2)]
    for number, start in enumerate(range(0, 60, 10)):
        parts[number % 2].update(logits[start : start + 10], range(start, start + 10))
    parts[0].merge(parts[1])
    assert parts[0].finish().value == pytest.approx(score(logits, 25).finish().value, rel=1e-12)


def test_nothing_to_score_and_scores_that_are_not_finite_are_refused():
    with pytest.raises(DataError, match="no images"):
        ScoreAccumulator().finish()
    with pytest.raises(DataError, match="not finite"), np.errstate(invalid="ignore"):
        score(np.full((4, 3), np.nan), 10).finish()
