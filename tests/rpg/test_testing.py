"""Testers: Python classes in this process, programs beside it; whatever fails is a result."""

import sys
import time

import pytest
import torch

from common.errors import ConfigError
from rpg.testing import PythonTester, TesterSection, build_tester, format_result, parse_result


class Linear(PythonTester):
    """Classifies four points on a line by the sign of ``weight * x``."""

    def __init__(self, scale: float = 1.0) -> None:
        self.x_N1 = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]) * scale

    def logits(self, state, *, task=None):
        return torch.cat((-self.x_N1, self.x_N1), dim=1) * state["weight"], torch.tensor([0, 0, 1, 1])


class TaskTester(PythonTester):
    """Answers the task's number, so that a test shows which task it was told."""

    needs_task = True

    def predict(self, state, *, task=None):
        return torch.tensor([task]), torch.tensor([793])

    logits = None


class Broken(PythonTester):
    def logits(self, state, *, task=None):
        raise RuntimeError("shapes do not fit\nsecond line")


class LogitsAlone:
    target_N = torch.tensor([0, 1])

    def logits(self, state):
        return torch.tensor([[1.0, 0.0], [1.0, 0.0]])


def python(name: str, **options):
    sys.modules["tester_of_tests"] = sys.modules[__name__]  # an importable name, however pytest imported this file
    return build_tester(TesterSection(kind="python", target=f"tester_of_tests:{name}", options=options))


def program(text: str, timeout: float = 30.0):
    return build_tester(
        TesterSection(kind="command", command=["{python}", "-c", text, "{path}"], timeout_seconds=timeout)
    )


def test_a_python_tester_gives_loss_accuracy_predictions_and_logits():
    tester, state = python("Linear"), {"weight": torch.tensor(1.0)}
    result = tester.measure(state)
    assert result.accuracy == 1.0 and 0 < result.loss < 0.2 and result.error is None
    predicted, target = tester.predict(state)
    assert predicted.dtype == target.dtype == torch.int64 and torch.equal(predicted, target)
    assert tester.logits(state)[0].shape == (4, 2)
    assert tester.measure({"weight": torch.tensor(-1.0)}).accuracy == 0.0


def test_a_tester_with_logits_and_targets_apart_works():
    tester = python("LogitsAlone")
    assert tester.measure({}).accuracy == 0.5
    assert [part.tolist() for part in tester.predict({})] == [[0, 0], [0, 1]]


def test_a_file_is_read_and_its_name_says_the_task(tmp_path):
    path = tmp_path / "generated_x_class0793_001.pth"
    torch.save({"weight": torch.ones(3)}, path)
    assert python("TaskTester").test(path).accuracy == 1.0
    assert "told the task" in python("TaskTester").measure({}).error


def test_what_a_tester_raises_is_a_result():
    result = python("Broken").measure({})
    assert result.error == "RuntimeError: shapes do not fit"
    assert "second line" in result.output and result.accuracy is None


def test_a_missing_file_is_a_result(tmp_path):
    assert "missing.pth" in python("Linear").test(tmp_path / "missing.pth").error


def test_a_program_gets_the_path_and_its_last_line_counts(tmp_path):
    result = program("import sys; print('Loss: 9 | Acc: 0.1'); print(f'Loss: 0.5 | Acc: 0.{len(sys.argv[1])}')").test(
        "four"
    )
    assert (result.loss, result.accuracy, result.error) == (0.5, 0.4, None)


def test_the_path_is_one_argument_that_no_shell_reads(tmp_path):
    path = tmp_path / "a b; touch harm.pth"
    result = program("import sys; print(sys.argv[1:]); print('Loss: 0 | Acc: 1')").test(path)
    assert repr([str(path)]) in result.output and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, reason",
    [
        ("print('before'); raise SystemExit(3)", "exit code 3"),
        ("import os, signal; print('before', flush=True); os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("print('before')", "no line"),
    ],
)
def test_a_program_that_crashes_is_a_result_with_its_output(text, reason):
    result = program(text).test("x.pth")
    assert reason in result.error and "before" in result.output and result.accuracy is None


def test_a_program_that_hangs_is_ended_with_its_children():
    text = (
        "import subprocess, sys, time; print('before', flush=True); "
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    started = time.perf_counter()
    result = program(text, timeout=1.0).test("x.pth")
    assert time.perf_counter() - started < 20
    assert "timeout_seconds=1" in result.error and "before" in result.output


def test_a_program_that_does_not_exist_is_a_result():
    tester = build_tester(TesterSection(kind="command", command=["no-such-program-here", "{path}"]))
    assert "no-such-program-here cannot be started" in tester.test("x.pth").error


def test_programs_have_no_predictions():
    with pytest.raises(ConfigError, match="tester.kind=python"):
        program("0").predict({})


def test_no_tester_tests_nothing():
    assert str(build_tester(TesterSection()).test("x.pth")) == "not tested"


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"kind": "python"}, "must name a class"),
        ({"kind": "python", "target": "os.path"}, "must name a class"),
        ({"kind": "command", "command": ["python", "test.py"]}, "{path}"),
        ({"kind": "shell"}, "tester.kind='shell'"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
    ],
)
def test_sections_that_cannot_work_are_refused(options, reason):
    with pytest.raises(ConfigError, match=reason):
        TesterSection(**options)


@pytest.mark.parametrize("target", ["no_such_module_here:A", "rpg.tasks:NoSuchClass"])
def test_a_class_that_does_not_exist_is_named(target):
    with pytest.raises(ConfigError, match=target.split(":")[1] if "rpg" in target else "no_such_module_here"):
        build_tester(TesterSection(kind="python", target=target))


def test_results_are_printed_and_read():
    assert parse_result("Loss: 7 | Acc: 0\n" + format_result(0.125, 0.9) + "\nend") == (0.125, 0.9)
    assert parse_result("Loss: x") is None
