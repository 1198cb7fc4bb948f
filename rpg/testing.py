"""Whether a network works: testers that run in this process, and test programs that run beside it under a time limit.

A tester in Python is any class with ``logits(state)`` or ``predict(state)``::

    class MyTester(PythonTester):
        def __init__(self, folder: str): ...
        def logits(self, state, *, task=None):     # state dict -> (logits_NC, target_N)

(or ``logits(state)`` alone with an attribute ``target_N``); where answers are too large to keep, ``score(state)``
gives the loss and the accuracy at once. ``tester.target=my_module:MyTester`` and
``tester.options={folder: DIR}`` name it. A program is an argument list in which ``{path}`` stands for the checkpoint
and ``{python}`` for this interpreter; it prints ``Loss: 0.1234 | Acc: 0.9876``. Whatever goes wrong inside a test
becomes ``TestResult.error``: a tester must not end the run that calls it.

Dimensions: N test examples, C classes.
"""

import importlib
import math
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from common.config import require_choice
from common.errors import ConfigError, QuintetError
from rpg.checkpoint_files import read_checkpoint
from rpg.tasks import task_in_name

KINDS = ("none", "python", "command")
OUTPUT_LIMIT = 20_000  # characters of a program's output that are kept: its end, where the result and the error are
_NUMBER = r"([-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf))"
_RESULT = re.compile(rf"Loss:\s*{_NUMBER}\s*\|\s*Acc:\s*{_NUMBER}", re.IGNORECASE)

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class TestResult:
    """What one test said.

    Attributes:
        loss: mean over the test examples; None if the test does not say or failed.
        accuracy: 0 to 1; None likewise.
        error: one line on what went wrong; None if nothing did.
        output: what the program printed, or the traceback of a tester in Python.
        seconds: wall time.
    """

    __test__ = False  # no test case, whatever pytest thinks of its name

    loss: float | None = None
    accuracy: float | None = None
    error: str | None = None
    output: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.error is not None:
            return f"test failed: {self.error}"
        if self.loss is None and self.accuracy is None:
            return "not tested"
        return format_result(self.loss, self.accuracy)


def format_result(loss: float | None, accuracy: float | None) -> str:
    """The line that test programs print and ``parse_result`` reads."""
    unknown = math.nan
    return f"Loss: {unknown if loss is None else loss:.4f} | Acc: {unknown if accuracy is None else accuracy:.4f}"


def parse_result(output: str) -> tuple[float, float] | None:
    """(loss, accuracy) of the last line ``Loss: x | Acc: x`` in a program's output; None if there is none."""
    found = _RESULT.findall(output)
    return (float(found[-1][0]), float(found[-1][1])) if found else None


@dataclass(frozen=True, kw_only=True)
class TesterSection:
    """Options ``tester.*``."""

    __test__ = False  # no test case, like all classes here whose names begin so

    kind: Literal["none", "python", "command"] = "none"
    target: str | None = None  # python: "module:Class"
    options: dict[str, Any] = field(default_factory=dict)  # python: arguments of the class
    command: list[str] = field(default_factory=list)  # command: argument list with {path}; no shell reads it
    timeout_seconds: float = 600.0  # command: a program that takes longer is ended and reported

    def __post_init__(self) -> None:
        require_choice("tester.kind", self.kind, KINDS)
        if not self.timeout_seconds > 0:
            raise ConfigError(f"tester.timeout_seconds={self.timeout_seconds} must be above 0.")
        if self.kind == "python" and not re.fullmatch(r"[\w.]+:\w+", self.target or ""):
            raise ConfigError(
                f"tester.target={self.target!r} must name a class, for example "
                "tester.target=rpg.zoo.testers:RecipeTester."
            )
        if self.kind == "command" and not any("{path}" in part for part in self.command):
            raise ConfigError(
                f"tester.command={list(self.command)} must be a list of arguments that holds {{path}}, for example "
                '\'tester.command=["{python}",test.py,"{path}"]\'.'
            )


# ---------------------------------------------------------------------------------------------------------- testers


class Tester:
    """Tests networks; this one tests nothing (``tester.kind=none``)."""

    __test__ = False
    kind = "none"

    def test(self, path: Path | str) -> TestResult:
        """The result of a checkpoint file or adapter folder; failures are in ``error``, none is raised."""
        return TestResult()

    def measure(self, state: State, *, task: int | None = None) -> TestResult:
        """The same for a state dict in memory.

        Raises: ConfigError for testers that are programs, which read files.
        """
        return TestResult()

    def predict(self, state: State, *, task: int | None = None) -> tuple[Tensor, Tensor]:
        """(predicted_N, target_N), int64: the classes that the network answers and the right ones.

        Raises: ConfigError for testers that are not in Python.
        """
        raise ConfigError(f"tester.kind={self.kind} gives no predictions; set tester.kind=python and tester.target.")

    def logits(self, state: State, *, task: int | None = None) -> tuple[Tensor, Tensor]:
        """(logits_NC float32, target_N int64), for ensembles.

        Raises: ConfigError for testers that have none.
        """
        raise ConfigError(f"tester.kind={self.kind} gives no logits; set tester.kind=python and tester.target.")

    @property
    def has_predictions(self) -> bool:
        return False

    @property
    def classes_N(self) -> Tensor | None:
        """Original class of each test example, where the tester knows it (task networks answer only yes or no)."""
        return None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Of the original classes, where the tester knows them."""
        return None


class PythonTester(ABC):
    """Base of testers in Python: from the logits follow predictions, loss and accuracy.

    Attributes:
        needs_task: whether the targets depend on the task; ``task`` is then the number in the file's name.
        classes_N: original class of each test example, or None.
        class_names: of the original classes, or None.
    """

    needs_task = False
    classes_N: Tensor | None = None
    class_names: tuple[str, ...] | None = None

    @abstractmethod
    def logits(self, state: State, *, task: int | None = None) -> tuple[Tensor, Tensor]:
        """(logits_NC, target_N) of the network with these weights on all test examples."""

    def predict(self, state: State, *, task: int | None = None) -> tuple[Tensor, Tensor]:
        """(predicted_N, target_N), int64."""
        logits_NC, target_N = self.logits(state, task=task)
        return logits_NC.argmax(dim=-1), target_N

    def loss(self, logits_NC: Tensor, target_N: Tensor) -> float:
        """Mean cross-entropy in nats; task networks use the focal loss instead."""
        return float(F.cross_entropy(logits_NC.float(), target_N))


class _InProcess(Tester):
    """Adapts a class of the user's: calls what it has and turns its exceptions into results."""

    kind = "python"

    def __init__(self, section: TesterSection) -> None:
        self._target = section.target
        self._tester = _load_class(section.target)(**section.options)
        if not callable(getattr(self._tester, "predict", None)) and not callable(getattr(self._tester, "logits", None)):
            raise ConfigError(f"tester.target={section.target} has neither predict(state) nor logits(state); add one.")

    def test(self, path: Path | str) -> TestResult:
        return self._guarded(lambda: self._test(read_checkpoint(Path(path)), self._task_of(path)))

    def measure(self, state: State, *, task: int | None = None) -> TestResult:
        return self._guarded(lambda: self._test(state, task))

    def predict(self, state: State, *, task: int | None = None) -> tuple[Tensor, Tensor]:
        if callable(getattr(self._tester, "predict", None)):
            predicted_N, target_N = self._tester.predict(state, **self._arguments(task))
        else:
            logits_NC, target_N = self.logits(state, task=task)
            predicted_N = logits_NC.argmax(dim=-1)
        return predicted_N.long().cpu(), target_N.long().cpu()

    def logits(self, state: State, *, task: int | None = None) -> tuple[Tensor, Tensor]:
        if not callable(getattr(self._tester, "logits", None)):
            raise ConfigError(f"tester.target={self._target} has no logits(state), which ensembles need; add it.")
        answered = self._tester.logits(state, **self._arguments(task))
        logits_NC, target_N = answered if isinstance(answered, tuple) else (answered, self._tester.target_N)
        return logits_NC.float().cpu(), target_N.long().cpu()

    @property
    def has_predictions(self) -> bool:
        return True

    @property
    def classes_N(self) -> Tensor | None:
        return getattr(self._tester, "classes_N", None)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return getattr(self._tester, "class_names", None)

    def _task_of(self, path: Path | str) -> int | None:
        return task_in_name(path) if getattr(self._tester, "needs_task", False) else None

    def _arguments(self, task: int | None) -> dict[str, int]:
        if not getattr(self._tester, "needs_task", False):
            return {}
        if task is None:
            raise ConfigError(
                f"tester.target={self._target} tests task networks and was not told the task; name the file "
                "..._class0793... (task 793), or pass the task."
            )
        return {"task": task}

    def _test(self, state: State, task: int | None) -> TestResult:
        started = time.perf_counter()
        loss = None
        if callable(getattr(self._tester, "score", None)):
            loss, accuracy = self._tester.score(state, **self._arguments(task))
            return TestResult(float(loss), float(accuracy), seconds=time.perf_counter() - started)
        with torch.no_grad():
            if callable(getattr(self._tester, "logits", None)):
                logits_NC, target_N = self.logits(state, task=task)
                predicted_N = logits_NC.argmax(dim=-1)
                if callable(getattr(self._tester, "loss", None)):
                    loss = float(self._tester.loss(logits_NC, target_N))
            else:
                predicted_N, target_N = self.predict(state, task=task)
        accuracy = float((predicted_N == target_N).double().mean())
        return TestResult(loss, accuracy, seconds=time.perf_counter() - started)

    @staticmethod
    def _guarded(test: Any) -> TestResult:
        started = time.perf_counter()
        try:
            return test()
        except Exception as error:  # a network that does not fit its tester is a result, whatever the tester raises
            line = str(error).strip().splitlines()
            kind = "" if isinstance(error, QuintetError) else f"{type(error).__name__}: "
            return TestResult(
                error=f"{kind}{line[0] if line else '(no message)'}",
                output=traceback.format_exc()[-OUTPUT_LIMIT:],
                seconds=time.perf_counter() - started,
            )


class _Program(Tester):
    """Runs an argument list in a process group of its own, and ends all of it when the time is over."""

    kind = "command"

    def __init__(self, section: TesterSection) -> None:
        self._command, self._timeout = section.command, section.timeout_seconds

    def test(self, path: Path | str) -> TestResult:
        started = time.perf_counter()
        arguments = [part.replace("{path}", str(path)).replace("{python}", sys.executable) for part in self._command]
        try:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            reason = f"tester.command: {arguments[0]} cannot be started ({error.strerror}); give a program that exists."
            return TestResult(error=reason, seconds=time.perf_counter() - started)
        try:
            raw, _ = process.communicate(timeout=self._timeout)
            error = None if process.returncode == 0 else _ending(process.returncode)
        except subprocess.TimeoutExpired:
            raw = _end_group(process)
            error = f"took longer than tester.timeout_seconds={self._timeout:g} and was ended"
        except BaseException:
            _end_group(process)
            raise
        output = raw.decode(errors="replace")[-OUTPUT_LIMIT:]
        result = parse_result(output)
        if error is None and result is None:
            error = "printed no line `Loss: x | Acc: x`"
        loss, accuracy = result if error is None else (None, None)
        return TestResult(loss, accuracy, error, output, time.perf_counter() - started)

    def measure(self, state: State, *, task: int | None = None) -> TestResult:
        raise ConfigError("tester.kind=command tests files; save the network first, or set tester.kind=python.")


def _ending(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"was ended by {name}"
    return f"ended with exit code {code}"


def _end_group(process: subprocess.Popen) -> bytes:
    """Kills the program and everything it started; returns what it had printed."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    raw, _ = process.communicate()
    return raw or b""


def _load_class(target: str) -> type:
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != module and not module.startswith(f"{error.name}."):
            raise  # the module is there and misses one of its own
        raise ConfigError(f"tester.target={target}: there is no module {module}; check its name.") from None
    except AttributeError:
        raise ConfigError(f"tester.target={target}: {module} has no {name}; check the name of the class.") from None


def build_tester(section: TesterSection) -> Tester:
    """The tester that ``section`` describes; data of testers in Python is loaded here, once.

    Raises: ConfigError for a class that does not exist; whatever error its constructor has for the user.
    """
    if section.kind == "python":
        return _InProcess(section)
    return _Program(section) if section.kind == "command" else Tester()
