"""Llama-8B planned, traced and predicted by LoGAH-Tiny into a null sink, in bf16: 16 GB that no disk has to take.

    python -m benchmarks.logah_8b [--json FILE] [--size Tiny]

Its largest tensor, 128256 x 4096, is decoded in blocks of rows; memory is the peak of a fresh process.
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.logah_streaming import SIZES, fresh

TARGET = "llama-8b"
PLAN_SECONDS, MEMORY_GB = 5.0, 4.0


def measure(size: str = "Tiny") -> dict:
    """All figures."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = str(Path(folder) / size)
        fresh("store", checkpoint, size)
        found = {name: round(value, 3) for name, value in fresh("predict", checkpoint, TARGET, "bf16").items()}
    limits = (("plan, s", PLAN_SECONDS, "built, traced and planned on meta"), ("GB in all", MEMORY_GB, "peak memory"))
    checks = [
        {"claim": f"{TARGET}: {claim}", "measured": found[name], "threshold": most, "passed": found[name] < most}
        for name, most, claim in limits
    ]
    return {"hypernetwork": f"LoGAH-{size}", "target": TARGET, **found, "checks": checks}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--size", choices=list(SIZES), default="Tiny")
    options = parser.parse_args()
    text = json.dumps(measure(options.size), indent=1)
    print(text)
    if options.json:
        options.json.write_text(text)


if __name__ == "__main__":
    main()
