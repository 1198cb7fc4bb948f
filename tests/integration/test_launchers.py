"""The launch scripts: sound bash, the command they promise, signals passed on, preempted jobs put back into the queue.

A stub stands for the interpreter and for SLURM's programs: it writes down how it was called, so nothing is trained. One
script per kind composes its configuration for real.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAPERS = ("radd", "diffullama", "mup_dit", "rpg", "logah")
SCRIPTS = sorted(path for paper in PAPERS for path in (ROOT / "scripts" / paper).glob("*.sh"))
ENTRY_POINTS = {
    "train_torchrun.sh": "train",
    "train_deepspeed.sh": "train",
    "train_slurm.sh": "train",
    "evaluate.sh": "evaluate",
    "generate.sh": "generate",
}
OWN_SCRIPTS = {  # of some papers only
    "mup_dit": {"sample.sh": "sample", "extract.sh": "extract", "geneval.sh": "sample"},
    "rpg": {"collect.sh": "collect", "commonsense.sh": "commonsense", "prompt.sh": "prompt"},
    "logah": {
        "finetune_torchrun.sh": "finetune", "finetune_deepspeed.sh": "finetune", "finetune_slurm.sh": "finetune",
        "predict.sh": "predict", "prepare.sh": "prepare",
    },
}  # fmt: skip
LEFT_OUT = {"mup_dit": {"generate.sh"}, "logah": {"generate.sh"}}  # sample.sh and predict.sh there
EXPECTED = {
    paper: {
        script: module
        for script, module in (ENTRY_POINTS | OWN_SCRIPTS.get(paper, {})).items()
        if script not in LEFT_OUT.get(paper, set())
    }
    for paper in PAPERS
}
# the second module of geneval.sh, and a session at the terminal, are checked by their own papers
CALLED = [(p, s) for p, scripts in EXPECTED.items() for s in scripts if s not in ("geneval.sh", "prompt.sh")]
CLEARED = ("NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RUN_DIR", "PYTHON", "ZERO", "SBATCH_ARGS")

RECORD = 'printf "%q " "$(basename "$0")" "$@" >>"${CALLS}"; echo >>"${CALLS}"\n'
PYTHON = (
    "#!/usr/bin/env bash\n"
    + RECORD
    + """if [[ " $* " == *" --cfg job "* ]]; then echo "run_dir: ${STUB_RUN_DIR:-runs/stub}"; exit 0; fi
eval "${STUB_BODY:-true}"
"""
)
SRUN = (
    "#!/usr/bin/env bash\n"
    + RECORD
    + 'while [[ "$1" == --* ]]; do shift; [[ "$1" == --* || "$1" == bash ]] || shift; done\nexec "$@"\n'
)


@pytest.fixture
def launcher(tmp_path: Path):
    """Starts a script with stubs in place: ``launcher(script, *arguments, **environment) -> process``."""
    programs = tmp_path / "bin"
    programs.mkdir()
    stubs = {
        "python": PYTHON,
        "srun": SRUN,
        "sbatch": "#!/usr/bin/env bash\n" + RECORD,
        "nvidia-smi": "#!/bin/sh\nexit 1\n",
    }
    stubs["scontrol"] = "#!/usr/bin/env bash\n" + RECORD + 'if [[ "$1" == show ]]; then echo node0; echo node1; fi\n'
    for name, text in stubs.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        kept = {k: v for k, v in os.environ.items() if k not in CLEARED and not k.startswith(("SLURM", "STUB"))}
        kept |= {"PYTHON": str(programs / "python"), "PATH": f"{programs}:{os.environ['PATH']}"}
        kept |= {"CALLS": str(tmp_path / "calls"), **environment}
        return subprocess.Popen(
            ["bash", str(ROOT / "scripts" / script), *arguments],
            cwd=tmp_path,
            env=kept,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


def calls(folder: Path) -> list[list[str]]:
    path = folder / "calls"
    return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_every_launcher_of_the_specification_exists():
    assert {f"{path.parent.name}/{path.name}" for path in SCRIPTS} == {
        f"{paper}/{script}" for paper, scripts in EXPECTED.items() for script in scripts
    }


@pytest.mark.parametrize("script", [ROOT / "scripts" / "lib.sh", *SCRIPTS], ids=lambda path: path.name)
def test_scripts_are_sound_bash(script: Path):
    subprocess.run(["bash", "-n", str(script)], check=True)
    if script.name != "lib.sh":
        assert "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize(("paper", "script"), CALLED)
def test_check_shows_the_command_and_composes_it_but_does_not_run_it(launcher, tmp_path: Path, script: str, paper: str):
    code, err = finish(launcher(f"{paper}/{script}", "--check", "seed=3", "name=two words"))
    assert code == 0, err
    assert f"{script}: running: " in err
    assert "two\\ words" in err  # as it can be pasted
    [validated] = calls(tmp_path)
    assert validated[:3] == ["python", "-m", f"{paper}.{EXPECTED[paper][script]}"]
    assert validated[-2:] == ["--cfg", "job"]
    assert {"seed=3", "name=two words"} <= set(validated)


def test_one_process_needs_no_torchrun_and_keeps_its_exit_code(launcher, tmp_path: Path):
    code, _ = finish(launcher("radd/train_torchrun.sh", "seed=3", NPROC="1", RUN_DIR="runs/mine", STUB_BODY="exit 2"))
    assert code == 2
    assert calls(tmp_path) == [["python", "-m", "radd.train", "seed=3", "run_dir=runs/mine"]]


def test_several_processes_are_started_by_torchrun(launcher, tmp_path: Path):
    assert finish(launcher("radd/train_torchrun.sh", "seed=3", NPROC="4"))[0] == 0
    [call] = calls(tmp_path)
    assert call[:3] == ["python", "-m", "torch.distributed.run"]
    assert " ".join(call[3:]) == "--nnodes 1 --nproc_per_node 4 --standalone -m radd.train seed=3"


def test_several_machines_meet_at_the_first(launcher, tmp_path: Path):
    where = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "NPROC": "8"}
    assert finish(launcher("radd/evaluate.sh", **where))[0] == 0
    assert "--nnodes 2 --nproc_per_node 8 --node_rank 1 --master_addr node0 --master_port 29500 -m radd.evaluate" in (
        " ".join(calls(tmp_path)[0])
    )


@pytest.mark.parametrize(
    "arguments,environment,plan",
    [([], {}, "zero2"), ([], {"ZERO": "3"}, "zero3"), (["parallel=zero1"], {"ZERO": "3"}, "zero1")],
)
def test_deepspeed_script_chooses_a_zero_plan(launcher, tmp_path: Path, arguments, environment, plan: str):
    assert finish(launcher("radd/train_deepspeed.sh", *arguments, NPROC="2", **environment))[0] == 0
    [call] = calls(tmp_path)
    assert [word for word in call if word.startswith("parallel=")] == [f"parallel={plan}"]


@pytest.mark.parametrize("name,value", [("NPROC", "0"), ("NNODES", "two"), ("NODE_RANK", "-1")])
def test_a_bad_variable_is_named(launcher, tmp_path: Path, name: str, value: str):
    code, err = finish(launcher("radd/train_torchrun.sh", **{name: value}))
    assert code == 2
    assert f"{name}={value} must be a whole number" in err
    assert calls(tmp_path) == []


WAITS = (
    'trap "stopped=1" TERM USR1; touch "{started}"; while [[ -z "${{stopped:-}}" ]]; do sleep 0.05; done; sleep 0.2; '
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_trainer_and_its_checkpoint_is_reported(launcher, tmp_path: Path, number: int):
    started, run_dir = tmp_path / "started", tmp_path / "run"
    run_dir.mkdir()
    # torchrun would turn 85 into 1
    body = WAITS.format(started=started) + f'touch "{run_dir}/REQUEUE"; exit 1'
    process = launcher("radd/train_torchrun.sh", NPROC="2", STUB_BODY=body, STUB_RUN_DIR=str(run_dir))
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    code, err = finish(process)
    assert code == 85, err
    assert "stopped after a checkpoint; the same command continues" in err


def test_a_failure_without_a_signal_stays_a_failure(launcher, tmp_path: Path):
    (tmp_path / "REQUEUE").touch()
    os.utime(tmp_path / "REQUEUE", (1, 1))  # left over from an earlier stop
    code, _ = finish(launcher("radd/train_torchrun.sh", NPROC="2", STUB_BODY="exit 1", STUB_RUN_DIR=str(tmp_path)))
    assert code == 1


JOB = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[0-1]", "NNODES": "2", "NPROC": "4"}
TASK = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "3"}  # what srun gives to one of its tasks


def test_slurm_script_submits_itself_with_the_nodes_it_needs(launcher, tmp_path: Path):
    variables = {"NNODES": "4", "NPROC": "8", "SBATCH_ARGS": "--partition=gpu --time=1-00"}
    code, err = finish(launcher("radd/train_slurm.sh", "experiment=x", **variables))
    assert code == 0, err
    validated, submitted = calls(tmp_path)
    assert validated[-2:] == ["--cfg", "job"]  # before it waits in the queue
    expected = "sbatch --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 --partition=gpu --time=1-00"
    assert " ".join(submitted) == f"{expected} {ROOT}/scripts/radd/train_slurm.sh experiment=x"


@pytest.mark.parametrize("paper", PAPERS)
def test_slurm_script_asks_for_the_signal_and_for_requeueing(paper: str):
    text = (ROOT / "scripts" / paper / "train_slurm.sh").read_text()
    for directive in ("--requeue", "--signal=B:USR1@120", "--open-mode=append"):
        assert f"#SBATCH {directive}\n" in text


def test_slurm_tasks_become_ranks(launcher, tmp_path: Path):
    body = 'echo "${RANK} ${WORLD_SIZE} ${LOCAL_RANK} ${MASTER_ADDR} ${MASTER_PORT}" >"${CALLS}.ranks"'
    code, err = finish(launcher("radd/train_slurm.sh", "seed=3", STUB_BODY=body, **JOB, **TASK))
    assert code == 0, err
    assert (tmp_path / "calls.ranks").read_text() == "3 8 3 node0 20077\n"


def test_a_preempted_slurm_job_goes_back_into_the_queue(launcher, tmp_path: Path):
    started, run_dir = tmp_path / "started", tmp_path / "run"
    run_dir.mkdir()
    body = WAITS.format(started=started) + f'touch "{run_dir}/REQUEUE"; exit 85'
    process = launcher("radd/train_slurm.sh", STUB_BODY=body, STUB_RUN_DIR=str(run_dir), **JOB, **TASK)
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    code, err = finish(process)
    assert code == 0, err
    assert ["scontrol", "requeue", "77"] in calls(tmp_path)


def test_a_failed_slurm_job_does_not_go_back_into_the_queue(launcher, tmp_path: Path):
    (tmp_path / "REQUEUE").touch()
    os.utime(tmp_path / "REQUEUE", (1, 1))
    code, _ = finish(launcher("radd/train_slurm.sh", STUB_BODY="exit 2", STUB_RUN_DIR=str(tmp_path), **JOB, **TASK))
    assert code == 2
    assert all(call[:2] != ["scontrol", "requeue"] for call in calls(tmp_path))


def test_slurm_nodes_that_do_not_match_are_named(launcher):
    code, err = finish(launcher("radd/train_slurm.sh", **{**JOB, "NNODES": "4"}))
    assert code == 2
    assert "NNODES=4, but SLURM gave 2" in err


def test_a_mistake_is_found_by_check_from_any_folder(launcher):
    code, err = finish(launcher("radd/train_torchrun.sh", "--check", "optim.lrr=1", PYTHON=sys.executable))
    assert code == 2
    assert err.splitlines()[-1] == "error: optim.lrr is not an option; did you mean optim.lr?"
