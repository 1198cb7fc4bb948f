"""A RADD run that is killed twenty times with SIGKILL ends bit for bit where an undisturbed run ends.

Children are forked from a server that has imported the entry point once, so that a restart costs milliseconds and
not the seconds of an import; each child then runs the real command line.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from common.checkpoint import find_checkpoint

TOTAL_STEPS = 240
KILLS = 20


def run_command(arguments: list[str], log: str) -> None:
    """Body of a child: ``python -m radd.train`` with these arguments, output to ``log``."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from radd.train import main

    torch.set_num_threads(1)
    sys.argv = ["radd.train", *arguments]
    main()


def arguments(run_dir: Path, cache: Path) -> list[str]:
    return [
        "model=tiny_radd",
        "data=embedded",
        f"data.cache_dir={cache}",
        f"run_dir={run_dir}",
        "training.batch_size=8",
        "training.accum=2",
        f"training.n_iters={TOTAL_STEPS}",
        "training.log_freq=4",
        "training.eval_freq=0",
        "training.snapshot_freq=0",
        "training.snapshot_freq_for_preemption=3",
        "training.loss_type=k_DCE",
        "model.hidden_size=32",
        "model.n_blocks=1",
        "model.length=32",
        "model.dropout=0.1",
        "precision=fp32",
        "tracking.progress=false",
    ]


def logged(run_dir: Path) -> list[tuple]:
    """Step, loss and learning rate of every record: what must not depend on interruptions (times do)."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("train/loss"), r.get("train/lr"), r.get("train/grad_norm")) for r in records]


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["radd.train"])
    return context


def finish(process) -> int:
    process.join(timeout=240)
    assert process.exitcode is not None, "the run did not end in time"
    return process.exitcode


@pytest.mark.slow
def test_run_killed_twenty_times_equals_undisturbed_run(tmp_path: Path, server):
    cache = tmp_path / "cache"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    undisturbed = server.Process(target=run_command, args=(arguments(whole, cache), str(tmp_path / "whole.log")))
    began = time.monotonic()
    undisturbed.start()
    assert finish(undisturbed) == 0, (tmp_path / "whole.log").read_text()
    # Delays are drawn so that twenty attempts together last about as long as the whole run: kills hit imports of data,
    # training steps and saves alike.
    longest = max(0.3, 2 * (time.monotonic() - began) / KILLS)
    delays = random.Random(5)
    killed = 0
    for _ in range(KILLS):
        child = server.Process(target=run_command, args=(arguments(cut, cache), str(tmp_path / "cut.log")))
        child.start()
        child.join(timeout=delays.uniform(0.05, longest))
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            killed += 1
        child.join()
        assert child.exitcode in (-signal.SIGKILL, 0), (tmp_path / "cut.log").read_text()
    last = server.Process(target=run_command, args=(arguments(cut, cache), str(tmp_path / "cut.log")))
    last.start()
    assert finish(last) == 0, (tmp_path / "cut.log").read_text()

    assert killed >= KILLS // 2, f"only {killed} attempts were still running when their signal came"
    expected, got = find_checkpoint(whole), find_checkpoint(cut)
    for name in ("model.safetensors", "ema.safetensors"):
        want, have = load_file(expected / name), load_file(got / name)
        assert want.keys() == have.keys()
        for key, tensor in want.items():
            assert tensor.equal(have[key]), f"{name}: {key} differs"
    assert logged(cut) == logged(whole)
