"""Starts programs on several gloo processes, as torchrun does, and collects their output."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch

ROOT = Path(__file__).resolve().parents[2]


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child: one thread, no GPU, this repository importable, no inherited torchrun variables."""
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in dropped and "TORCHELASTIC" not in name}
    path = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path} | dict(extra or {})


def torchrun_command(target: str | Path, nproc: int, args: Sequence[object] = ()) -> list[str]:
    """``torchrun`` on one machine and a free port; ``target`` is a script or a dotted module name."""
    is_script = str(target).endswith(".py")
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}",
        *([] if is_script else ["-m"]), str(target), *map(str, args),
    ]  # fmt: skip


def run_torchrun(
    target: str | Path,
    nproc: int = 2,
    args: Sequence[object] = (),
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Runs ``target`` on ``nproc`` processes and returns exit code and output.

    Args:
        timeout: seconds after which the whole process group is killed.
        check: fail the test, showing the output, unless the exit code is 0.
    """
    command = torchrun_command(target, nproc, args)
    process = subprocess.Popen(
        command, cwd=ROOT, env=child_environment(env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"{command} ran past {timeout} s\n{out[-4000:]}\n{err[-4000:]}") from None
    if check:
        assert process.returncode == 0, f"{command} exited with {process.returncode}\n{out[-4000:]}\n{err[-8000:]}"
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def finish() -> NoReturn:
    """Ends a worker that has done its work, without the interpreter's own end.

    There a thread of the collective libraries now and then aborts the process ("terminate called without an active
    exception"), in about one of ten long workers and after all results are written; tests are about these.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
