"""Curves of a run: thinned, with the mean of the last steps, and held-out points where there are any."""

import json
from pathlib import Path

import pytest

from common.reproduction.curves import CURVE_POINTS, HELD_OUT, LAST_STEPS, training_curve


def test_curve_is_thinned_and_ends_in_the_mean_of_the_last_steps(tmp_path: Path):
    steps = 2 * CURVE_POINTS + 1
    records = [{"step": step, "train/loss": float(step)} for step in range(1, steps + 1)]
    records.insert(10, {"step": 10, HELD_OUT: 3.5})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = training_curve(path)
    assert len(found["steps"]) == CURVE_POINTS
    assert found["losses"][0] == 1.5
    assert (found["validation_steps"], found["validation_bounds"]) == ([10], [3.5])
    assert found["last"] == pytest.approx(steps - (LAST_STEPS - 1) / 2)
