"""Parametrisation tables on the meta device: DiT-XL/2 and an MMDiT of 18 billion parameters, no weight allocated.

    python -m benchmarks.mup_dit_tables

A table (type, width multiplier, init, learning-rate, weight-decay and forward multiplier of every parameter) needs the
shapes of the model and of two narrow ones. Memory is the peak above what the process held after its imports.
"""

import json
import statistics
import time
from pathlib import Path

import yaml

from benchmarks.diffullama_training_step import resident_bytes
from mup_dit.building import build_skeleton, read_model_config

MODELS = Path(__file__).resolve().parents[1] / "configs" / "mup_dit" / "model"
REPEATS = 3
LIMITS = {  # model: seconds, bytes
    "dit-xl-2": (2.0, 200 * 2**20),
    "mmdit-18b": (30.0, None),
}


def measure() -> dict:
    """Seconds (median) and bytes (of the first time) by model, and their limits."""
    rows, checks = {}, []
    for name, (most_seconds, most_bytes) in LIMITS.items():
        config = read_model_config(yaml.safe_load((MODELS / f"{name}.yaml").read_text()))
        before, seconds, held = resident_bytes("VmRSS"), [], 0
        for repeat in range(REPEATS):
            started = time.perf_counter()
            model = build_skeleton(config)
            seconds.append(time.perf_counter() - started)
            held = held or max(resident_bytes("VmHWM") - before, 0)
            assert len(model.scalings) == len(list(model.parameters())), repeat
        count = sum(parameter.numel() for parameter in model.parameters())
        median = statistics.median(seconds)
        rows[name] = {
            "parameters (billion)": count / 1e9,
            "rows of the table": len(model.scalings),
            "seconds": median,
            "first time, seconds": seconds[0],
            "MiB above imports": held / 2**20,
        }
        checks.append(
            {
                "claim": f"{name}: table in time",
                "measured": f"{median:.2f} s",
                "threshold": f"< {most_seconds:g} s",
                "passed": median < most_seconds,
            }
        )
        if most_bytes is not None:
            checks.append(
                {
                    "claim": f"{name}: memory beyond the imports",
                    "measured": f"{held / 2**20:.0f} MiB",
                    "threshold": f"< {most_bytes / 2**20:.0f} MiB",
                    "passed": held < most_bytes,
                }
            )
    return {"models": rows, "checks": checks}


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
