"""The curve of a trained network, from the run folder's records."""

import json
from pathlib import Path

import numpy as np

HELD_OUT = "validation/bound"  # what the reproductions' hooks log
LAST_STEPS = 100  # over which the last training loss is averaged
CURVE_POINTS = 200  # of a training curve kept in the results


def training_curve(path: Path) -> dict:
    """Training and held-out losses of a run, thinned to ``CURVE_POINTS``, with the last steps' mean and deviation.

    Args:
        path: ``metrics.jsonl`` of a run that logged every step.
    """
    records = [json.loads(line) for line in path.read_text().splitlines()]
    steps = np.array([record["step"] for record in records if record.get("train/loss") is not None])
    losses = np.array([record["train/loss"] for record in records if record.get("train/loss") is not None])
    width = max(1, len(steps) // CURVE_POINTS)
    whole = len(steps) // width * width
    last = losses[-LAST_STEPS:]
    validation = [record for record in records if record.get(HELD_OUT) is not None]
    return {
        "steps": steps[:whole].reshape(-1, width).mean(axis=1).round(2).tolist(),
        "losses": losses[:whole].reshape(-1, width).mean(axis=1).round(5).tolist(),
        "validation_steps": [record["step"] for record in validation],
        "validation_bounds": [record[HELD_OUT] for record in validation],
        "last": float(last.mean()),
        "last_deviation": float(last.std(ddof=1)) if len(last) > 1 else 0.0,
    }
