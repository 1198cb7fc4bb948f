"""The learning rates of the reproduction: every arm at every candidate rate, judged by its held-out bound.

    python -m diffullama.reproduction.sweep                  10 minutes on two cores, runs/diffullama-sweep
    python -m diffullama.reproduction.sweep --seed 100

Run once; the better rates are frozen in ``settings.py``. Arms that start from the AR network start from it at its own
better rate, so the AR arm comes first. The same command again continues.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from common.report import Table, print_tables
from common.report.command import exit_code
from common.report.page import write_atomically
from common.report.provenance import usable_cores
from common.reproduction.jobs import Job, run_jobs
from common.reproduction.run import claim, source_revision
from diffullama.reproduce import REPRODUCTION
from diffullama.reproduction.settings import FULL, SWEPT_RATES, Arm, Settings

SEED = 100  # not one of the reproduction's, so that no arm is tuned on the run that it is judged by


def sweep(settings: Settings, output: Path, seed: int, *, processes: int) -> Table:
    """Trains and scores all arms at all rates; writes and returns the table."""
    claim(output, "diffullama")
    revision = source_revision("diffullama", REPRODUCTION.presentation)
    arms = settings.arms()
    shared = {"seed": seed, "cache_dir": str(output / "cache")}

    def run_dir(arm: Arm, rate: float) -> str:
        return str(output / "runs" / f"{arm.name}-{rate:g}-{revision[:8]}")

    def jobs_of(arm: Arm, parent_dir: str | None) -> list[Job]:
        found = []
        for rate in SWEPT_RATES:
            values = replace(settings, learning_rates={**settings.learning_rates, arm.name: rate}).as_dict()
            arguments = {**shared, "settings": values, "arm": arm.name, "run_dir": run_dir(arm, rate)}
            training = arguments | ({"parent_dir": parent_dir} if arm.parent else {})
            name = f"{arm.name}-{rate:g}"
            found.append(Job(f"train-{name}", "diffullama.reproduction.training:train", training, ("data",)))
            found.append(Job(f"score-{name}", "diffullama.reproduction.scoring:score", arguments, (f"train-{name}",)))
        return found

    data = Job(
        "data",
        "diffullama.reproduction.training:prepare_data",
        {"settings": settings.as_dict(), "cache_dir": shared["cache_dir"]},
    )
    results: dict[str, dict] = {}

    def run(jobs: list[Job]) -> None:
        results.update(run_jobs([data, *jobs], output / "parts", revision=revision, processes=processes))

    def bound(arm: Arm, rate: float) -> dict:
        return results[f"score-{arm.name}-{rate:g}"]["bound"]

    first, *others = arms
    run(jobs_of(first, None))
    best = min(SWEPT_RATES, key=lambda rate: bound(first, rate)["mean"])
    others.sort(key=lambda arm: -arm.steps)
    run([job for arm in others for job in jobs_of(arm, run_dir(first, best))])
    rows = []
    for arm in arms:
        numbers = [f"{bound(arm, rate)['mean']:.3f}" for rate in SWEPT_RATES]
        rows.append([arm.label, arm.steps, *numbers, min(SWEPT_RATES, key=lambda rate: bound(arm, rate)["mean"])])
    table = Table(name="sweep", columns=["arm", "steps", *(f"{rate:g}" for rate in SWEPT_RATES), "better"], rows=rows)
    write_atomically(output / "sweep.csv", table.to_csv().encode())
    return table


def main() -> int:
    """The command line."""
    description, _, usage = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m diffullama.reproduction.sweep",
        description=description,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("runs/diffullama-sweep"), help="folder to write")
    parser.add_argument("--seed", type=int, default=SEED, help="of data order, masks and initial weights")
    parser.add_argument("--processes", type=int, default=min(8, usable_cores()), help="jobs at a time")
    options = parser.parse_args()
    print_tables([sweep(FULL, options.output, options.seed, processes=options.processes)], title="held-out bound")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
