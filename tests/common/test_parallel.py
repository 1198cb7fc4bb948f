"""Joining processes, and what the plans refuse."""

import os
import signal

import pytest
import torch

from common.errors import ConfigError
from common.parallel import Parallel, start
from common.plans import build_plan
from common.preemption import StopRequest
from common.testing.tiny_task import TinyTask, tiny_config
from common.trainer import fit


def test_one_process_needs_no_environment():
    with start("none") as parallel:
        assert (parallel.rank, parallel.world_size, parallel.is_main) == (0, 1, True)
        assert parallel.sum([1.0, 2.5]) == [1.0, 2.5]
        assert parallel.gather("x") == ["x"]
        assert parallel.from_main({"a": 1}) == {"a": 1}


def test_inner_start_returns_the_outer_one():
    with start("none") as outer:
        with start("none") as inner:
            assert inner is outer
        with pytest.raises(ConfigError, match="this process was started with none"), start("ddp"):
            pass


def test_several_processes_need_a_plan_that_keeps_them_together(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="parallel.plan=none does not work with 2 processes"), start("none"):
        pass


class Blockless(TinyTask):
    def repeated_blocks(self, model):
        return []


def alone(plan: str = "none") -> Parallel:
    return Parallel(0, 1, 0, torch.device("cpu"), plan)


def test_activation_checkpointing_without_blocks_is_refused(tmp_path):
    task = Blockless()
    config = tiny_config(tmp_path, parallel={"activation_checkpointing": True})
    with pytest.raises(ConfigError, match="names no repeated blocks"):
        build_plan(task, task.build_model(), config, alone(), "fp32")


def test_compilation_under_zero3_is_refused(tmp_path):
    task = TinyTask()
    config = tiny_config(tmp_path, plan="zero3", parallel={"compile": True})
    with pytest.raises(ConfigError, match="parallel.compile=true does not work with parallel.plan=zero3"):
        build_plan(task, task.build_model(), config, alone("zero3"), "fp32")


def test_each_block_is_recomputed_then_compiled_and_names_stay(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    task = TinyTask()
    config = tiny_config(tmp_path, parallel={"compile": True, "activation_checkpointing": True})
    plan = build_plan(task, task.build_model(), config, alone(), "fp32")
    assert len(compiled) == 2
    assert all(function.func.__name__ == "checkpoint" for function in compiled)
    assert list(plan.module.state_dict()) == list(task.build_model().state_dict())


def test_global_size_that_does_not_divide_is_refused_before_anything_is_written(tmp_path):
    from common.config import BatchConfig

    config = tiny_config(tmp_path / "run", batch=BatchConfig(global_size=9, micro_size=2))
    with pytest.raises(ConfigError, match="batch.global_size=9"):
        fit(TinyTask(), config, train_loader=None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_is_noted_and_earlier_handler_restored(number: signal.Signals):
    before = signal.getsignal(number)
    with StopRequest().listening() as stop:
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.signal_name == number.name
    assert signal.getsignal(number) is before


def test_a_run_leaves_the_libraries_functions_as_they_were(monkeypatch):
    """DeepSpeed's ZeRO-3 replaces ``linear`` for the whole process."""
    before = torch.nn.functional.linear
    with start("none"):
        monkeypatch.setattr(torch.nn.functional, "linear", lambda *arguments: None)
    assert torch.nn.functional.linear is before
