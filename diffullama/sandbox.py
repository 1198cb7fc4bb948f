"""Programs that a model wrote, run where they can do little harm.

A program runs in a Python process of its own (``-I -S``: no site packages, no user settings, nothing imported from the
working folder), with an empty environment, an empty temporary folder as its working folder, and limits on processor
time, wall-clock time, memory, file sizes, open files and processes. Before it starts, ``sandbox_guest.py`` gives up
what it can:

* ``network namespace``: one without any device; as root, or where user namespaces are allowed;
* ``process namespace``: the program sees no other process, and none that it starts outlives it; likewise;
* ``landlock``: only the temporary folder can be written, only Python's own files and the system's libraries can be
  read, and no other program can be executed (Linux 5.13 and later);
* ``process limit``: no process or thread can be started; not for root, whom the kernel exempts;
* ``audit hook``: the interpreter refuses network, process and foreign-library calls, and files outside the folder.

``isolation()`` names those in force. **Not protected against**: a program that breaks out of the Python
interpreter (through a bug of it, or by undoing the audit hook) on a kernel without Landlock and namespaces has the
rights of the user who evaluates; kernel bugs; what can be learned from reading Python's installation; a processor kept
busy up to the limits. A program can also fake its own success by inspecting the interpreter: a verdict is no proof
against malice. On a machine that matters, evaluate in a container or a virtual machine as well.
"""

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from common.config import require_at_least
from common.errors import ConfigError

GUEST = Path(__file__).with_name("sandbox_guest.py")
PASSED, FAILED, TIMED_OUT, OUT_OF_MEMORY = "passed", "failed", "timed out", "out of memory"
MAX_MESSAGE = 2000  # characters of an error that are kept
START_SECONDS = 10.0  # for the interpreter to start, beside the program's own time


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use.

    Attributes:
        seconds: wall-clock time of the program; its processor time is limited to the next whole second.
        memory_mb: address space of the process, the interpreter's own 20 MB included.
        file_mb: largest file it may write, and largest output.
    """

    seconds: float = 5.0
    memory_mb: int = 512
    file_mb: int = 1

    def __post_init__(self) -> None:
        require_at_least("sandbox.memory_mb", self.memory_mb, 64)
        require_at_least("sandbox.file_mb", self.file_mb, 0)
        if not 0 < self.seconds <= 600:
            raise ConfigError(f"sandbox.seconds={self.seconds} must be above 0 and at most 600.")


@dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Attributes:
        outcome: ``passed`` if it ran to its end, ``failed`` if it raised or left early, ``timed out`` or
            ``out of memory``.
        message: the last line of its error; empty if there was none.
        isolation: protections that were in force, see ``isolation``.
    """

    outcome: str
    message: str
    isolation: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return self.outcome == PASSED


def run_program(source: str, limits: Limits | None = None, *, audit_hook: bool = True) -> Verdict:
    """Runs Python source in the sandbox; never raises for anything the program does.

    Args:
        audit_hook: False leaves everything to the kernel, which is how its part is tested.

    Raises: ConfigError where the operating system has no process limits (not a Unix).
    """
    if os.name != "posix":
        raise ConfigError(f"code can be executed on Unix systems only, not on {os.name}; set humaneval.execute=false.")
    limits = limits or Limits()
    token = secrets.token_hex(16)  # printed by the guest after the program's end: an early exit code 0 is no success
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
        read_end, write_end = os.pipe()
        request = {"source": source, "token": token, "folder": folder, "readable": _readable(), "hook": audit_hook}
        request |= {"report": write_end, "limits": _kernel_limits(limits)}
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(GUEST)],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(write_end,),
            start_new_session=True,
        )
        os.close(write_end)
        with os.fdopen(read_end, "rb") as report:
            try:
                started = _start(process, json.dumps(request).encode(), report)
                late = _wait(process, limits.seconds if started else START_SECONDS)
            finally:
                _kill(process)
            lines = report.read(64 * 1024).decode("utf-8", errors="replace").splitlines()
    return _verdict(started, lines, token, late, process.returncode)


def _start(process: subprocess.Popen, request: bytes, report) -> list[str] | None:
    """Hands the program over; the guest's list of protections once they are in force, None if it never answered."""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(request)
        process.stdin.close()
    line = _read_line(report, START_SECONDS)
    return json.loads(line) if line else None


def _read_line(report, seconds: float) -> bytes:
    ready, _, _ = select.select([report], [], [], seconds)
    return report.readline(64 * 1024) if ready else b""


def _wait(process: subprocess.Popen, seconds: float) -> bool:
    """Whether the process was still running after the time."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def _kill(process: subprocess.Popen) -> None:
    """Ends the whole session, so that nothing outlives the verdict."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _verdict(started: list[str] | None, lines: list[str], token: str, late: bool, code: int) -> Verdict:
    isolation = tuple(started or ())
    if started is None:
        return Verdict(FAILED, "the sandbox could not start", isolation)
    if token in lines:
        return Verdict(PASSED, "", isolation)
    if late or code == -signal.SIGXCPU:
        return Verdict(TIMED_OUT, "", isolation)
    error = next((line for line in reversed(lines) if line.strip()), "")[:MAX_MESSAGE]
    if error.startswith("MemoryError"):
        return Verdict(OUT_OF_MEMORY, error, isolation)
    if not error:
        error = f"ended by signal {-code}" if code < 0 else f"left with exit code {code} before its end"
    return Verdict(FAILED, error, isolation)


def _kernel_limits(limits: Limits) -> dict[str, int]:
    """What the guest sets by ``resource.setrlimit``."""
    return {
        "RLIMIT_CPU": int(limits.seconds) + 2,
        "RLIMIT_AS": limits.memory_mb << 20,
        "RLIMIT_FSIZE": limits.file_mb << 20,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": 0,
    }


@cache
def _readable() -> list[str]:
    """Folders that Python itself needs: its standard library, its binary and the system's libraries."""
    paths = sysconfig.get_paths()
    found = {paths["stdlib"], paths["platstdlib"], str(Path(sys.base_prefix) / "lib")}
    found |= {folder for folder in ("/usr/lib", "/usr/lib64", "/lib", "/lib64") if Path(folder).is_dir()}
    return sorted(str(Path(path).resolve()) for path in found if Path(path).exists())


@cache
def isolation() -> tuple[str, ...]:
    """The protections in force on this machine, by running an empty program; named as in this module's docstring."""
    return run_program("").isolation
