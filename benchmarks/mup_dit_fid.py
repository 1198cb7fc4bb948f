"""FID statistics: streaming float64 moments of two sets of Inception-sized features, and their distance.

    python -m benchmarks.mup_dit_fid [--json FILE] [--rows 50000]

Features are drawn block by block, so that memory shows what the accumulators keep; drawing is not timed.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np

from mup_dit.metrics.frechet import frechet_distance
from mup_dit.metrics.moments import BLOCK, MomentAccumulator, Moments

ROWS, FEATURES, BATCH = 50_000, 2048, 500
LIMIT_SECONDS = 20.0
LIMIT_GROWTH_MB = 64.0


def stream(rows: int, seed: int, scale: float) -> tuple[Moments, float, float]:
    """Moments of so many rows, the seconds they took, and the growth of peak memory (MB) after a tenth of the rows."""
    rng = np.random.default_rng(seed)
    accumulator, seconds, peak_early = MomentAccumulator(), 0.0, 0.0
    spectrum_D = scale / np.sqrt(1 + np.arange(FEATURES, dtype=np.float32))
    for start in range(0, rows, BATCH):
        count = min(BATCH, rows - start)
        features = np.abs(rng.standard_normal((count, FEATURES), np.float32)) * spectrum_D
        began = time.perf_counter()
        accumulator.update(features)
        seconds += time.perf_counter() - began
        if start <= max(rows // 10, 4 * BLOCK) < start + BATCH:
            peak_early = peak_megabytes()
    growth = peak_megabytes() - peak_early
    began = time.perf_counter()
    moments = accumulator.finish()
    return moments, seconds + time.perf_counter() - began, growth


def peak_megabytes() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(rows: int = ROWS) -> dict[str, object]:
    """All figures; ``checks`` holds the claims with their thresholds."""
    first, first_seconds, growth = stream(rows, 0, 1.0)
    second, second_seconds, _ = stream(rows, 1, 1.1)
    began = time.perf_counter()
    distance = frechet_distance(first, second)
    distance_seconds = time.perf_counter() - began
    total = first_seconds + second_seconds + distance_seconds
    itself = abs(frechet_distance(first, first)) / float(np.trace(first.covariance_DD))
    return {
        "setting": f"two sets of {rows} x {FEATURES} float32 features in batches of {BATCH}; float64 moments",
        "seconds": {
            "moments of both sets": round(first_seconds + second_seconds, 2),
            "distance": round(distance_seconds, 2),
            "in all": round(total, 2),
        },
        "distance": round(distance, 4),
        "memory": {"growth after the first tenth, MB": round(growth, 1), "peak, MB": round(peak_megabytes())},
        "checks": [
            {
                "claim": "two sets and the distance, seconds",
                "measured": round(total, 2),
                "threshold": f"<= {LIMIT_SECONDS:g}",
                "passed": total <= LIMIT_SECONDS,
            },
            {
                "claim": "memory does not grow with the number of images, MB",
                "measured": round(growth, 1),
                "threshold": f"<= {LIMIT_GROWTH_MB:g}",
                "passed": growth <= LIMIT_GROWTH_MB,
            },
            {
                "claim": "distance of a set to itself, over the trace",
                "measured": itself,
                "threshold": "<= 1e-6",
                "passed": itself <= 1e-6,
            },
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--rows", type=int, default=ROWS, help="images of each set")
    arguments = parser.parse_args()
    text = json.dumps(measure(arguments.rows), indent=1)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
