"""The sandbox: verdicts, limits, and what programs must not do, with the audit hook and by the kernel alone."""

import os
import time
from pathlib import Path

import pytest

from common.errors import ConfigError
from diffullama.sandbox import FAILED, OUT_OF_MEMORY, PASSED, TIMED_OUT, Limits, isolation, run_program

QUICK = Limits(seconds=1.0, memory_mb=256)
KERNEL = set(isolation()) - {"audit hook"}


def test_a_program_passes_only_by_coming_to_its_end():
    assert run_program("from typing import List\nx: List[int] = [1]\nassert x == [1]").outcome == PASSED
    for source, message in [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "left with exit code 0 before its end"),
        ("def f(:", "SyntaxError"),
        ("def f(): return f()\nf()", "RecursionError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ]:
        verdict = run_program(source, QUICK)
        assert verdict.outcome == FAILED and message in verdict.message, source


@pytest.mark.parametrize("source", ["while True: pass", "import time; time.sleep(60)", "input()\nwhile 1: pass"])
def test_endless_programs_are_stopped_in_time(source):
    began = time.monotonic()
    verdict = run_program(source, Limits(seconds=0.5))
    assert verdict.outcome == TIMED_OUT or "EOF" in verdict.message or "closed" in verdict.message
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("source", ["x = [0] * 10**10", "x = []\nwhile True: x.append('y' * 10**6)"])
def test_memory_is_limited(source):
    assert run_program(source, QUICK).outcome == OUT_OF_MEMORY


def test_output_is_discarded_and_files_are_small_and_temporary():
    assert run_program("print('x' * 10**7)", QUICK).passed
    source = "open('a', 'w').write('x' * 100)\nassert open('a').read() == 'x' * 100\nimport os\nprint(os.getcwd())"
    assert run_program(source, QUICK).passed
    assert "File too large" in run_program("open('a', 'w').write('x' * 3 * 10**6)", QUICK).message
    assert run_program("import os\nassert os.listdir('.') == []", QUICK).passed


def test_nothing_is_inherited(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    source = "import os, sys\nassert 'SECRET_TOKEN' not in os.environ\nassert '' not in sys.path and sys.flags.isolated"
    assert run_program(source, QUICK).passed
    for module in ("numpy", "common", "diffullama"):
        assert "ModuleNotFoundError" in run_program(f"import {module}", QUICK).message


ATTEMPTS = {
    "connection": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
    "look-up": "import socket\nsocket.getaddrinfo('example.org', 80)",
    "reading": "open({secret!r}).read()",
    "writing": "open({secret!r}, 'w').write('x')",
    "removing": "import os\nos.remove({secret!r})",
    "listing": "import os\nos.listdir({folder!r})",
    "shell": "import subprocess\nsubprocess.run(['/bin/ls'], check=True)",
    "program": "import os\nos.execv('/bin/ls', ['ls'])",
}


@pytest.fixture
def surroundings(tmp_path):
    """A file that programs must not touch and a port that they must not reach."""
    import socket

    secret = tmp_path / "secret"
    secret.write_text("content")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        yield {"secret": str(secret), "folder": str(tmp_path), "port": server.getsockname()[1]}
        with pytest.raises(TimeoutError):
            server.accept()
    assert secret.read_text() == "content"


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_network_files_and_programs_are_out_of_reach(attempt, surroundings):
    verdict = run_program(ATTEMPTS[attempt].format(**surroundings), QUICK)
    assert verdict.outcome == FAILED and "PermissionError" in verdict.message


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_the_kernel_alone_keeps_them_out_of_reach(attempt, surroundings):
    needed = "network namespace" if attempt in ("connection", "look-up") else "landlock"
    if needed not in KERNEL:
        pytest.skip(f"this kernel offers no {needed}")
    verdict = run_program(ATTEMPTS[attempt].format(**surroundings), QUICK, audit_hook=False)
    assert verdict.outcome == FAILED and ("Error" in verdict.message or "gaierror" in verdict.message)


def test_processes_do_not_outlive_the_verdict(tmp_path):
    assert "os.fork is not allowed" in run_program("import os\nos.fork()", QUICK).message
    if "process namespace" not in KERNEL:
        pytest.skip("this kernel offers no process namespace")
    before = set(os.listdir("/proc"))
    source = "import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(60)"
    run_program(source, QUICK, audit_hook=False)
    started = [pid for pid in set(os.listdir("/proc")) - before if pid.isdecimal()]
    assert not [pid for pid in started if "sandbox_guest" in command_line(pid)]


def command_line(pid: str) -> str:
    try:
        return Path("/proc", pid, "cmdline").read_text()
    except OSError:
        return ""


def test_the_audit_hook_is_always_in_force_and_limits_are_checked():
    assert "audit hook" in isolation()
    for options, message in [({"seconds": 0}, "seconds=0"), ({"memory_mb": 1}, "memory_mb=1")]:
        with pytest.raises(ConfigError, match=message):
            Limits(**options)
