"""Timing in turns and memory in fresh processes, for benchmarks. No benchmark itself."""

import importlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.diffullama_training_step import resident_bytes

ROOT = Path(__file__).resolve().parents[1]


def interleaved(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, one after the other in every round; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def peak_growth(function: str, argument: str, repeats: int = 3) -> float:
    """Bytes that a call needs at its peak, above what the process held before: the median of fresh processes.

    Args:
        function: ``"module:function"``, which prepares everything and returns the call to measure.
    """
    command = [sys.executable, "-m", "benchmarks.processes", function, argument]
    done = [subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True) for _ in range(repeats)]
    return statistics.median(float(one.stdout.split()[-1]) for one in done)


def main() -> None:
    """Runs in the fresh process."""
    module, name = sys.argv[1].split(":")
    call = getattr(importlib.import_module(module), name)(sys.argv[2])
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident_bytes("VmRSS")
    call()
    print(resident_bytes("VmHWM") - before)


if __name__ == "__main__":
    main()
