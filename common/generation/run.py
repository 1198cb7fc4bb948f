"""Sampled rows of all processes into one file, with a progress bar and the cost of the run."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tqdm import tqdm

from common.diffusion.absorbing import FinishedRow
from common.diffusion.samplers import Calls
from common.generation.sample_file import SampleFile, SampleRecord
from common.parallel import Parallel


@dataclass
class Generation:
    """Texts and what they cost, over all processes.

    Attributes:
        records: all texts by row number (on other processes than the main one: those of this process).
        expected: calls that a row should need.
        launches, rows, calls: of this invocation (rows kept from an earlier one cost nothing), summed over processes.
        seconds: wall time of the sampling, the slowest process's.
    """

    records: list[SampleRecord]
    expected: Calls
    launches: int = 0
    rows: int = 0
    calls: int = 0
    seconds: float = 0.0

    def summary(self) -> str:
        """Measured against expected calls, in one line."""
        if not self.rows:
            return f"{len(self.records)} texts, none of them new"
        error = math.sqrt(self.expected.variance / self.rows)
        bound = "at most " if self.expected.is_bound else ""
        expected = f"{bound}{self.expected.mean:.1f}" + (f" ± {error:.1f}" if error else "")
        return (
            f"{self.rows} texts in {self.seconds:.1f} s: {self.calls / self.rows:.1f} network calls per text, expected "
            f"{expected}; {self.launches} launches"
        )


def write_rows(
    finished: Iterable[FinishedRow],
    to_record: Callable[[FinishedRow], SampleRecord],
    file: SampleFile,
    parallel: Parallel,
    *,
    total: int,
    expected: Calls,
    progress: bool,
) -> Generation:
    """Runs this process's sampler to its end, writes each row when it is complete, and merges all processes' rows.

    Args:
        finished: the rows of this process.
        to_record: what is written about one.
        file: prepared by the main process.
        total: number of this process's rows.
        expected: calls of a row, for the summary.
        progress: whether the main process shows a bar (on a terminal only).
    """
    started = time.perf_counter()
    launches = calls = 0
    hidden = not (progress and parallel.is_main)
    for row in tqdm(finished, total=total, unit="text", disable=True if hidden else None, leave=False):
        launches, calls = max(launches, row.launches), calls + row.calls
        file.append(to_record(row))
    seconds = time.perf_counter() - started
    totals = [int(value) for value in parallel.sum([launches, total, calls])]
    (slowest,) = parallel.max([seconds])
    return Generation(file.merge() if parallel.is_main else file.own(), expected, *totals, slowest)
