"""Jobs of a reproduction: one thread each, as many at a time as there are processes, each result kept on disk.

A job is a module-level function with JSON-able arguments and result. A result is reused when the job, its arguments and
the source revision are the same, so a reproduction that was killed continues where it was.
"""

import contextlib
import hashlib
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from common.report.page import write_atomically


class Interrupted(RuntimeError):
    """A signal stopped a job; the same command continues it."""


@dataclass(frozen=True)
class Job:
    """One unit of work.

    Attributes:
        name: unique, also the file name of the result.
        function: ``"module:function"``, called with ``arguments``.
        needs: names of jobs that must be finished first.
    """

    name: str
    function: str
    arguments: Mapping[str, object]
    needs: tuple[str, ...] = ()

    def fingerprint(self, revision: str) -> str:
        """Hash of everything that the result depends on."""
        text = json.dumps([self.function, dict(self.arguments), revision], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def call(function: str, arguments: Mapping[str, object]) -> tuple[dict, float]:
    """Result and processor seconds of one job, in this process; wall time would count other programs' work."""
    module, name = function.split(":")
    began = time.process_time()
    result = getattr(importlib.import_module(module), name)(**arguments)
    return result, time.process_time() - began


def prepare_worker() -> None:
    """One thread, no GPU (results should not depend on the machine), and an end together with the parent."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(1)

    def follow_parent() -> None:
        parent = multiprocessing.parent_process()
        multiprocessing.connection.wait([parent.sentinel])
        # A killed parent must not leave a trainer behind that writes into the folder its successor continues.
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def stored(path: Path, fingerprint: str) -> dict | None:
    """The result at ``path`` if it is complete and of the same job; else None."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("fingerprint") == fingerprint else None


def run_jobs(
    jobs: Sequence[Job],
    folder: Path,
    *,
    revision: str,
    processes: int,
    report: Callable[[Job, dict, float, bool], None] = lambda *_: None,
) -> dict[str, dict]:
    """Runs all jobs, each after those it needs.

    Args:
        folder: where results are kept, ``<name>.json``.
        revision: of the sources; results of another one are computed again.
        processes: workers at a time; 0 runs everything in this process.
        report: called with (job, result, processor seconds, whether it was kept from before) as jobs finish.

    Returns: name -> result.
    Raises: what a job raises; jobs that were running are given up, finished ones stay on disk.
    """
    results: dict[str, dict] = {}
    waiting: list[Job] = []

    def finish(job: Job, result: dict, seconds: float) -> None:
        content = {"fingerprint": job.fingerprint(revision), "seconds": round(seconds, 3), "result": result}
        write_atomically(folder / f"{job.name}.json", json.dumps(content).encode())
        results[job.name] = result
        report(job, result, seconds, False)

    for job in jobs:
        found = stored(folder / f"{job.name}.json", job.fingerprint(revision))
        if found is None:
            waiting.append(job)
        else:
            results[job.name] = found["result"]
            report(job, found["result"], found["seconds"], True)

    def ready() -> list[Job]:
        return [job for job in waiting if all(name in results for name in job.needs)]

    if processes == 0:
        while waiting:
            job = ready()[0]
            waiting.remove(job)
            finish(job, *call(job.function, job.arguments))
        return results

    running: dict[Future, Job] = {}
    with (
        one_thread(),
        ProcessPoolExecutor(
            min(processes, max(1, len(waiting))), multiprocessing.get_context("spawn"), prepare_worker
        ) as pool,
    ):
        try:
            while waiting or running:
                for job in ready()[: processes - len(running)]:
                    waiting.remove(job)
                    running[pool.submit(call, job.function, dict(job.arguments))] = job
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    finish(running.pop(future), *future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
    return results


@contextlib.contextmanager
def one_thread():
    """Children started inside use one thread: libraries read these variables when they are loaded."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
