"""What every paper's ``reproduce.py`` does: runs its jobs, judges them, writes the section, continues when interrupted.

A paper supplies its jobs, a line on each result and the section made of them (``Reproduction``); the command line,
the folder, provenance and exit codes are the same for all.
"""

import argparse
import hashlib
import math
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.cli import EXIT_INTERRUPT, EXIT_REQUEUE
from common.errors import ConfigError
from common.report import Section, print_tables, provenance
from common.report.page import pretty_json, write_atomically
from common.report.provenance import usable_cores
from common.report.section_folder import RESULTS, holds_section, save_section
from common.report.tables import checks_table
from common.reproduction.jobs import Interrupted, Job, run_jobs

MARKER = "reproduction.json"  # makes a folder ours
FULL_SEEDS = 3
SOURCES = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """A paper's part.

    Attributes:
        paper: its package.
        plan: ``(settings, seeds, output folder, source revision) -> jobs``, those that take long first.
        summary: one line on a finished job, from its name and result.
        build_section: ``(settings, seeds, results by job name, facts) -> section``.
        presentation: names of files that show results without changing them; they do not enter the revision.
        small, full: settings, anything with ``as_dict()``.
        full_help: what ``--full`` adds, and how long it takes.
        print_tables: how many of the section's tables the terminal shows before the thresholds.
    """

    paper: str
    plan: Callable[[Any, Sequence[int], Path, str], list[Job]]
    summary: Callable[[str, dict], str]
    build_section: Callable[[Any, Sequence[int], Mapping[str, Mapping], Mapping], Section]
    presentation: tuple[str, ...]
    small: Any
    full: Any
    full_help: str
    print_tables: int = 1


def source_revision(paper: str, presentation: Sequence[str]) -> str:
    """Hash of the sources that results depend on, so that a result of other code is not reused."""
    digest = hashlib.sha256()
    for package in ("common", paper):
        for path in sorted((SOURCES / package).rglob("*.py")):
            if "report" not in path.parts and path.name not in presentation:
                digest.update(path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def seeds(first: int, full: bool) -> list[int]:
    """The seeds of a reproduction.

    Raises: ConfigError for a negative seed.
    """
    if first < 0:
        raise ConfigError(f"--seed={first} is negative; use 0 or more.")
    return list(range(first, first + (FULL_SEEDS if full else 1)))


def claim(output: Path, paper: str) -> None:
    """Makes the folder ours.

    Raises: ConfigError if it holds files that no reproduction wrote, or cannot be written to.
    """
    try:
        if output.is_dir() and any(output.iterdir()) and not ((output / MARKER).exists() or holds_section(output)):
            raise ConfigError(
                f"--output={output} is not empty and was not made by a reproduction; its files stay as they are. "
                "Choose a new folder."
            )
        write_atomically(output / MARKER, (pretty_json({"made by": f"python -m {paper}.reproduce"}) + "\n").encode())
    except OSError as error:
        raise ConfigError(
            f"--output={output} cannot be used ({error.strerror}); choose a folder you can write to."
        ) from error


def reproduce(
    reproduction: Reproduction, output: Path, settings: Any, run_seeds: Sequence[int], *, processes: int
) -> bool:
    """Runs everything, writes the section into ``output``, prints the result; whether all thresholds hold."""
    paper = reproduction.paper
    claim(output, paper)
    began = time.monotonic()
    revision = source_revision(paper, reproduction.presentation)
    jobs = reproduction.plan(settings, run_seeds, output, revision)
    finished: list[float] = []
    reused: list[str] = []

    def report(job: Job, result: dict, seconds: float, kept: bool) -> None:
        finished.append(seconds)
        if kept:
            reused.append(job.name)
        how = "kept" if kept else f"{seconds:.1f} s"
        line = reproduction.summary(job.name, result)
        print(f"{paper} [{len(finished):2d}/{len(jobs)}] {job.name}: {line} ({how})", flush=True)

    results = run_jobs(jobs, output / "parts", revision=revision, processes=processes, report=report)
    duration = f"{time.monotonic() - began:.0f} s ({math.fsum(finished):.0f} processor seconds of work"
    duration += f", {len(reused)} of {len(jobs)} parts kept from before)" if reused else ")"
    facts = provenance(seeds=", ".join(map(str, run_seeds)), duration=duration, processes=max(1, processes))
    section = reproduction.build_section(settings, run_seeds, results, facts)
    section = replace(section, listings={**section.listings, "settings": pretty_json(settings.as_dict())})
    save_section(
        output,
        section,
        values={"seeds": list(run_seeds), "settings": settings.as_dict(), "source": revision, "results": results},
    )
    shown = section.tables[: reproduction.print_tables]
    print_tables([*shown, checks_table(section.checks)], title=section.title)
    print(f"{paper}: {output / RESULTS}, {output / 'section.html'}; {duration}")
    return section.passed


def _interrupt(signal_number: int, frame: object) -> None:
    """Ends the run on SIGTERM; training jobs, which get the signal too, save before they end.

    Raises: Interrupted.
    """
    raise Interrupted(f"stopped by signal {signal_number}")


def run_command(reproduction: Reproduction, documentation: str) -> int:
    """The command line of a paper's ``reproduce.py``.

    Args:
        documentation: the module's docstring: a sentence, an empty line, the usage.

    Returns: 0 if every threshold holds, 1 if one was missed, 85 or 130 when interrupted.
    """
    paper = reproduction.paper
    description, _, usage = documentation.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=f"python -m {paper}.reproduce",
        description=description,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path(f"runs/{paper}-reproduction"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of data order, masks, initial weights and samples")
    parser.add_argument("--full", action="store_true", help=reproduction.full_help)
    parser.add_argument("--processes", type=int, help="jobs at a time, one thread each (default: cores, at most 8)")
    options = parser.parse_args()
    run_seeds = seeds(options.seed, options.full)
    processes = min(8, usable_cores()) if options.processes is None else options.processes
    if processes < 1:
        raise ConfigError(f"--processes={processes} is too small; it must be at least 1.")
    settings = reproduction.full if options.full else reproduction.small
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return 0 if reproduce(reproduction, options.output, settings, run_seeds, processes=processes) else 1
    except (KeyboardInterrupt, Interrupted) as stop:
        print(f"{paper}: interrupted; the same command continues", file=sys.stderr)
        return EXIT_INTERRUPT if isinstance(stop, KeyboardInterrupt) else EXIT_REQUEUE
