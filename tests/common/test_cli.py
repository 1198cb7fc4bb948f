"""Entry points answer every mistake with one line that names the option and a remedy, and exit code 2."""

import errno
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from common import cli
from common.config import OptimConfig, ParallelConfig
from common.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    size: int
    kind: Literal["fast", "exact"] = "fast"


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """What the toy entry point below receives."""

    run_dir: str
    must: str | None = None
    rate: float = 0.1
    part: PartConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


PRIMARY = """
defaults:
  - base
  - _self_
  - part: small
  - optim: adamw
  - parallel: none
  - launcher: local
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
run_dir: runs/toy
must: null
rate: 0.1
hydra:
  searchpath: [pkg://configs.common]
  sweep:
    dir: ${run_dir}
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch, capsys):
    """Runs the toy entry point from an empty folder: ``toy(*arguments, body=...) -> (code, configs, stderr)``."""
    configs = tmp_path / "configs"
    (configs / "part").mkdir(parents=True)
    (configs / "toy.yaml").write_text(PRIMARY)
    (configs / "part" / "small.yaml").write_text("size: 1\nkind: fast\n")
    (configs / "part" / "large_part.yaml").write_text("size: 1_000\nkind: exact\n")
    (configs / "part" / "open.yaml").write_text("size: ???\nkind: exact\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(cli, "OTHER_RANKS_WAIT_SECONDS", 0.0)
    # not inherited from a launcher around the test run
    for name in ("RANK", "WORLD_SIZE", "QUINTET_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str, body=None, print_config: bool = False):
        seen: list[ToyConfig] = []
        monkeypatch.delenv(cli.SWEPT_VARIABLE, raising=False)

        def main(config: ToyConfig) -> int | None:
            seen.append(config)
            return body(config) if body else None

        monkeypatch.setattr(sys, "argv", ["toy", *arguments])
        capsys.readouterr()
        try:
            code = cli.run(main, "toy", ToyConfig, str(configs), print_config=print_config)
        except SystemExit as stop:
            code = stop.code
        return code, seen, capsys.readouterr().err

    return run


def test_an_option_that_only_other_choices_have_is_told_apart(toy, tmp_path: Path):
    (tmp_path / "configs" / "part" / "plain.yaml").write_text("size: 1\n")
    code, _, err = toy("part=plain", "part.kind=exact")
    assert code == 2
    assert "part.kind is not an option of the part that is chosen; choose another with part=NAME" in err
    assert toy("part=plain", "++part.kind=exact")[1] == [
        ToyConfig(run_dir="runs/toy", part=PartConfig(size=1, kind="exact"))
    ]


def test_options_arrive_typed_and_nothing_is_written(toy):
    code, [config], err = toy("part=large_part", "rate=1e-4", "optim.lr='2e-4'", "parallel=fsdp2", "must=yes")
    assert (code, err) == (0, "")
    assert config.part == PartConfig(size=1000, kind="exact")
    assert (config.rate, config.optim.lr, config.parallel.plan) == (1e-4, 2e-4, "fsdp2")
    assert list(Path.cwd().iterdir()) == []  # neither outputs/ nor .hydra/


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["rat=1"], "rat is not an option; did you mean rate?"),
        (["lr=1"], "lr is not an option; did you mean optim.lr?"),
        (["optim.warm_up=1"], "optim.warm_up is not an option; did you mean optim.warmup?"),
        (["+optim.lrr=1"], "optim.lrr is not an option; did you mean optim.lr?"),
        (["prt=small"], "prt is not an option; did you mean part?"),
        (["~rte"], "rte is not an option; did you mean rate?"),
        (["part=smal"], "part=smal is not known; choose one of large_part, open, small. Did you mean small?"),
        (["part=part_large"], "Did you mean large_part?"),
        (["parallel=fsdp"], "parallel=fsdp is not known; choose one of ddp, fsdp2, none, zero1, zero2, zero3."),
        (["optim.optimizer=adamw"], "Did you mean 'AdamW'?"),
        (["part.kind=exakt"], "part.kind='exakt' is not known; choose one of fast, exact. Did you mean 'exact'?"),
        (["rate=fast"], "rate='fast' must be a number."),
        (["part.size=1.5"], "part.size=1.5 must be a whole number."),
        (["optim.lr=null"], "optim.lr=null must be a number."),
        (["part=open"], "part.size has no value and no default; add part.size=... to the command."),
        (["run_dir=???"], "run_dir has no value and no default; add run_dir=... to the command."),
        (["must=${runs_dir}"], "must refers to runs_dir, which does not exist; did you mean ${run_dir}?"),
        (["optim.beta1=1.5"], "optim.beta1=1.5 must lie in [0, 1)."),
        (["rate"], "cannot read 'rate'. Options are written key=value"),
        (["rate=[1"], "cannot read 'rate=[1': "),
        (["must=a, b"], "Ambiguous value for argument 'must=a, b' 1. To use it as a list, use key=[value1,value2]"),
        (["--config-name", "toys"], "--config-name toys does not exist."),
        (["--multirun", "rate=1,x"], "rate='x' must be a number."),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(toy, arguments: list[str], message: str):
    code, _, err = toy(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert message in err


def test_errors_of_the_run_are_one_line_too(toy):
    def body(config):
        raise DataError("data.train=x.txt does not exist; give a file that does.")

    assert toy(body=body)[::2] == (2, "error: data.train=x.txt does not exist; give a file that does.\n")


@pytest.mark.parametrize(
    "error,message",
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x"),
            "error: runs/x: No space left on device; free disk",
        ),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs/x"), "error: runs/x: Permission denied; "),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), "error: CUDA out of memory. Tried to"),
    ],
)
def test_full_disks_and_full_memory_are_the_users_to_repair(toy, error: Exception, message: str):
    def body(config):
        raise error

    code, _, err = toy(body=body)
    assert code == 2
    assert err.startswith(message)


def test_a_bug_keeps_its_traceback(toy):
    def body(config):
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError, match="ours"):
        toy(body=body)


def test_traceback_is_shown_when_asked_for(toy, monkeypatch):
    monkeypatch.setenv("QUINTET_TRACEBACK", "1")
    code, _, err = toy("rat=1")
    assert code == 2
    assert "Traceback (most recent call last)" in err
    assert err.endswith("error: rat is not an option; did you mean rate?\n")


def test_an_interrupted_run_exits_with_130_and_no_traceback(toy):
    def body(config):
        raise KeyboardInterrupt

    code, _, err = toy(body=body)
    assert code == 130
    assert err == "interrupted; the same command continues from the last checkpoint\n"


def test_a_preempted_run_exits_with_its_own_code_and_ends_a_sweep(toy):
    code, seen, _ = toy("--multirun", "rate=1,2", body=lambda config: cli.EXIT_REQUEUE)
    assert (code, len(seen)) == (85, 1)


def test_jobs_of_a_sweep_have_run_folders_of_their_own(toy):
    code, seen, err = toy("--multirun", "rate=1,2", "must=a/b,c:d", "part=small", "run_dir=sweep")
    assert (code, err) == (0, "")
    folders = [Path(config.run_dir).relative_to(Path.cwd()).as_posix() for config in seen]
    # named after what varies, so that adding a value to the sweep continues the others where they are
    assert folders == [f"sweep/must={must},rate={rate}" for rate in (1, 2) for must in ("a_b", "c_d")]


def test_a_sweep_of_long_values_numbers_its_folders(toy):
    code, seen, _ = toy("--multirun", f"must={'a' * 150},{'b' * 300}", "run_dir=sweep")
    assert code == 0
    assert [Path(config.run_dir).name for config in seen] == [f"must={'a' * 150}", "1"]


def test_the_options_are_shown_once_by_the_main_process_only(toy, monkeypatch):
    assert toy("rate=3", print_config=True)[2].count("rate: 3") == 1
    monkeypatch.setenv("RANK", "1")
    assert toy("rate=3", print_config=True)[2] == ""


def test_other_processes_name_themselves_if_they_outlive_the_main_one(toy, monkeypatch):
    monkeypatch.setenv("RANK", "3")

    def body(config):
        raise ConfigError("data.cache_dir=/x is missing on this node.")

    assert toy(body=body)[::2] == (2, "rank 3: error: data.cache_dir=/x is missing on this node.\n")


def test_show_config_and_help_leave_with_code_0(toy, capsys):
    assert toy("--cfg", "job", "rate=7")[0] == 0
    assert toy("--help")[0] == 0


def test_group_names_include_the_shared_ones():
    assert {"model", "data", "noise", "experiment", "optim", "parallel"} <= set(
        cli.group_names(cli.ROOT / "configs/radd")
    )


def test_submitit_tasks_become_ranks(monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(cli, "_launcher_name", lambda: "hydra_plugins.hydra_submitit_launcher.SlurmLauncher")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.delenv("RANK", raising=False)
    exported = []
    monkeypatch.setattr(submitit.helpers.TorchDistributedEnvironment, "__init__", lambda self: None)
    monkeypatch.setattr(submitit.helpers.TorchDistributedEnvironment, "export", lambda self: exported.append(True))
    cli._join_submitit_tasks()
    assert exported == [True]


def test_exit_codes_are_distinct():
    assert len({0, 1, cli.EXIT_USAGE, cli.EXIT_REQUEUE, cli.EXIT_INTERRUPT}) == 5
    assert json.dumps([cli.EXIT_USAGE, cli.EXIT_REQUEUE]) == "[2, 85]"  # the launch scripts hold these numbers
