"""The small reproduction of RADD: four losses, one bound; network calls as predicted; draws that keep rare tokens.

    python -m radd.reproduce                                 under 3 minutes on two cores, runs/radd-reproduction
    python -m radd.reproduce --output runs/mine --seed 1
    python -m radd.reproduce --full                          three seeds, geometric noise, n-gram baselines

Everything is computed from text embedded in Python, in float32 on the CPU. The same command again continues a
reproduction that was interrupted and reuses what is finished. The output folder holds results.json, section.html, a CSV
per table, two PNG per figure (for light and dark pages) and the run folders of the trained networks. Exit code 1: a
threshold was missed.
"""

import argparse
import hashlib
import math
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.cli import EXIT_INTERRUPT, EXIT_REQUEUE
from common.errors import ConfigError
from common.report import print_tables, provenance
from common.report.command import exit_code
from common.report.page import pretty_json, write_atomically
from common.report.provenance import usable_cores
from common.report.section_folder import RESULTS, holds_section, save_section
from common.report.tables import checks_table
from radd.reproduction.jobs import Job, run_jobs
from radd.reproduction.results import build_section
from radd.reproduction.sampling import ONE_STAGE
from radd.reproduction.settings import FULL, SMALL, Settings, seeds
from radd.reproduction.training import Interrupted

MARKER = "reproduction.json"  # makes a folder ours
PRESENTATION = ("checks.py", "figures.py", "results.py", "reproduce.py")  # results may be shown anew by other code
SOURCES = Path(__file__).resolve().parents[1]


def source_revision() -> str:
    """Hash of the sources that results depend on, so that a result of other code is not reused."""
    digest = hashlib.sha256()
    for package in ("common", "radd"):
        for path in sorted((SOURCES / package).rglob("*.py")):
            if "report" not in path.parts and path.name not in PRESENTATION:
                digest.update(path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def plan(settings: Settings, run_seeds: Sequence[int], output: Path, revision: str) -> list[Job]:
    """All jobs, those that take long or that others need first."""
    values, cache = settings.as_dict(), str(output / "cache")
    module = "radd.reproduction"
    jobs = [Job("data", f"{module}.training:prepare_data", {"settings": values, "cache_dir": cache})]

    def networks(seed: int) -> list[tuple[str, str, str]]:
        found = [(loss, "loglinear", f"{loss}-seed{seed}") for loss in settings.loss_types]
        if seed == run_seeds[0]:
            found += [(loss, "geometric", f"{loss}-geometric-seed{seed}") for loss in settings.geometric_losses]
        return found

    def run_dir(name: str) -> str:
        return str(output / "runs" / f"{name}-{revision[:8]}")

    for seed in run_seeds:
        for loss, noise, name in networks(seed):
            arguments = {"settings": values, "loss_type": loss, "noise": noise, "seed": seed}
            arguments |= {"run_dir": run_dir(name), "cache_dir": cache}
            jobs.append(Job(f"train-{name}", f"{module}.training:train", arguments, ("data",)))
    for seed in run_seeds:
        for loss, noise, name in networks(seed):
            arguments = {"settings": values, "seed": seed, "run_dir": run_dir(name), "cache_dir": cache}
            jobs.append(Job(f"score-{name}", f"{module}.scoring:score", arguments, (f"train-{name}",)))
            if loss in settings.ordered_losses and noise == "loglinear":
                arguments = {**arguments, "orders": settings.orders}
                jobs.append(Job(f"orders-{name}", f"{module}.scoring:score_orders", arguments, (f"train-{name}",)))
        for mode in (*ONE_STAGE, "two-stage"):
            arguments = {"mode": mode, "seed": seed, "settings": values}
            jobs.append(Job(f"precision-{mode}-seed{seed}", f"{module}.sampling:tail_share", arguments))
        noises = ["loglinear", *(["geometric"] if settings.geometric_losses and seed == run_seeds[0] else [])]
        loss = "lambda_DCE" if "lambda_DCE" in settings.loss_types else settings.loss_types[0]
        for noise in noises:
            arguments = {"settings": values, "seed": seed, "rows": settings.nfe_rows, "noise": noise}
            arguments["run_dir"] = run_dir(f"{loss}-seed{seed}")
            jobs.append(
                Job(
                    f"calls-{noise}-seed{seed}",
                    f"{module}.sampling:measure_calls",
                    arguments,
                    (f"train-{loss}-seed{seed}",),
                )
            )
    jobs.append(Job("baselines", f"{module}.scoring:baselines", {"settings": values, "cache_dir": cache}, ("data",)))
    return jobs


def claim(output: Path) -> None:
    """Makes the folder ours.

    Raises: ConfigError if it holds files that no reproduction wrote, or cannot be written to.
    """
    try:
        if output.is_dir() and any(output.iterdir()) and not ((output / MARKER).exists() or holds_section(output)):
            raise ConfigError(
                f"--output={output} is not empty and was not made by a reproduction; its files stay as they are. "
                "Choose a new folder."
            )
        write_atomically(output / MARKER, (pretty_json({"made by": "python -m radd.reproduce"}) + "\n").encode())
    except OSError as error:
        raise ConfigError(
            f"--output={output} cannot be used ({error.strerror}); choose a folder you can write to."
        ) from error


def summary(name: str, result: dict) -> str:
    """One line on a finished job."""
    if name.startswith("train-"):
        return f"training loss {result['last']:.3f}"
    if name.startswith("score-"):
        return "bounds " + ", ".join(f"{cell['mean']:.3f}" for cell in result["cells"].values())
    if name.startswith("orders-"):
        return f"mean over orders {result['random']['mean']:.4f} ± {result['random']['error']:.4f}"
    if name.startswith("calls-"):
        return "calls per row " + ", ".join(f"{point['measured']:.1f}" for point in result["points"])
    if name.startswith("precision-"):
        return f"share of rare tokens {result['share']:.3f} (exact {result['true_share']:.3f})"
    return ", ".join(
        f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in result.items()
    )


def reproduce(output: Path, settings: Settings, run_seeds: Sequence[int], *, processes: int) -> bool:
    """Runs everything, writes the section into ``output``, prints the result; whether all thresholds hold."""
    claim(output)
    began = time.monotonic()
    revision = source_revision()
    jobs = plan(settings, run_seeds, output, revision)
    finished: list[float] = []
    reused: list[str] = []

    def report(job: Job, result: dict, seconds: float, kept: bool) -> None:
        finished.append(seconds)
        if kept:
            reused.append(job.name)
        how = "kept" if kept else f"{seconds:.1f} s"
        print(f"radd [{len(finished):2d}/{len(jobs)}] {job.name}: {summary(job.name, result)} ({how})", flush=True)

    results = run_jobs(jobs, output / "parts", revision=revision, processes=processes, report=report)
    duration = f"{time.monotonic() - began:.0f} s ({math.fsum(finished):.0f} processor seconds of work"
    duration += f", {len(reused)} of {len(jobs)} parts kept from before)" if reused else ")"
    facts = provenance(seeds=", ".join(map(str, run_seeds)), duration=duration, processes=max(1, processes))
    section = build_section(settings, run_seeds, results, facts)
    listings = {**section.listings, "settings": pretty_json(settings.as_dict())}
    section = type(section)(**{**vars(section), "listings": listings})
    save_section(
        output,
        section,
        values={"seeds": list(run_seeds), "settings": settings.as_dict(), "source": revision, "results": results},
    )
    print_tables([section.tables[0], checks_table(section.checks)], title=section.title)
    print(f"radd: {output / RESULTS}, {output / 'section.html'}; {duration}")
    return section.passed


def interrupt(signal_number: int, frame: object) -> None:
    """Ends the run on SIGTERM; training jobs, which get the signal too, save before they end.

    Raises: Interrupted.
    """
    raise Interrupted(f"stopped by signal {signal_number}")


def main() -> int:
    description, _, usage = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m radd.reproduce",
        description=description,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("runs/radd-reproduction"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of data order, masks, initial weights and samples")
    parser.add_argument("--full", action="store_true", help="three seeds, geometric noise, baselines (20 minutes)")
    parser.add_argument("--processes", type=int, help="jobs at a time, one thread each (default: cores, at most 8)")
    options = parser.parse_args()
    run_seeds = seeds(options.seed, options.full)
    processes = min(8, usable_cores()) if options.processes is None else options.processes
    if processes < 1:
        raise ConfigError(f"--processes={processes} is too small; it must be at least 1.")
    settings = FULL if options.full else SMALL
    signal.signal(signal.SIGTERM, interrupt)
    try:
        return 0 if reproduce(options.output, settings, run_seeds, processes=processes) else 1
    except (KeyboardInterrupt, Interrupted) as stop:
        print("radd: interrupted; the same command continues", file=sys.stderr)
        return EXIT_INTERRUPT if isinstance(stop, KeyboardInterrupt) else EXIT_REQUEUE


if __name__ == "__main__":
    sys.exit(exit_code(main))
