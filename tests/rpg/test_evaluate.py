"""The command line: groups, tables and figures; test programs; tasks; generators; mistakes of the user."""

import csv
import json
import sys

import pytest
import torch

from common.errors import DataError
from rpg.baselines import perturb
from rpg.checkpoint_files import write_checkpoint
from rpg.evaluate import main
from rpg.evaluation import evaluate
from rpg.evaluation_config import EvaluateConfig
from rpg.figures import task_figure
from rpg.saving import save_generator
from rpg.task_report import TaskRow
from rpg.zoo.digit_tasks import DigitTaskRecipe, train_tasks, unstack
from rpg.zoo.digits import DigitRecipe, train_network
from tests.rpg.tiny_generator import networks, tiny_facts, tiny_generator

DIGITS = ["tester.kind=python", "tester.target=rpg.zoo.digits:DigitTester"]
TASKS = ["tester.kind=python", "tester.target=rpg.zoo.digit_tasks:DigitTaskTester"]
PROGRAM = """
import sys
if not sys.argv[1].endswith(".pth"):
    sys.exit("this program reads .pth files only")
print("Loss: 0.2500 | Acc: 0.7500")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Eight checkpoints of a training, and three "generated" networks: noisy ones, the last a copy."""
    root = tmp_path_factory.mktemp("digits")
    states = list(train_network(0, DigitRecipe(epochs=3, num_checkpoints=8)))
    for place, state in enumerate(states):
        write_checkpoint(root / "originals" / f"{place + 1:04d}_acc0.9000_digits.pth", state)
    for place in range(3):
        noise = torch.Generator().manual_seed(place)
        state = perturb(states[place], 0.3 if place < 2 else 0.0, noise)
        write_checkpoint(root / "generated" / f"generated_{place + 1:03d}.safetensors", state)
    return root


def command(monkeypatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rpg.evaluate", "progress=false", *options])
    return main()


def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())["values"]


def rows(path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def test_generated_networks_are_compared_with_originals_and_baselines(folders, tmp_path, monkeypatch, capsys):
    options = [
        f"originals={folders}/originals",
        f"generated={folders}/generated",
        *DIGITS,
        "baselines.noise=[0.01,0.3]",
        "baselines.noise_repeats=2",
        "baselines.interpolations=2",
        f"cache_dir={tmp_path}/cache",
    ]
    assert command(monkeypatch, *options, f"work_dir={tmp_path}/a") == 0
    found = results(tmp_path / "a")
    assert list(found["groups"]) == [
        "original",
        "generated",
        "noise 0.01",
        "noise 0.3",
        "mean of originals",
        "interpolated",
        "mean of generated",
    ]
    assert found["groups"]["original"]["accuracy"]["value"] > 0.7
    assert found["groups"]["original"]["accuracy"]["standard_error"] > 0
    listed = {row["network"]: row for row in rows(tmp_path / "a" / "networks.csv")}
    copy, noisy = listed["generated_003.safetensors"], listed["generated_001.safetensors"]
    assert copy["nearest original"] == "0003_acc0.9000_digits.pth" and float(copy["L2"]) < 1e-6
    assert float(copy["IoU nearest"]) == 1 and float(noisy["IoU nearest"]) < 1
    copies = found["findings"][0]
    assert copies["passed"] is False and "1 of 3 below the limit" in copies["measured"]
    assert {each["name"] for each in found["ensembles"]} == {"original", "generated", "interpolated"}
    assert len(rows(tmp_path / "a" / "iou.csv")) == 19
    assert len(rows(tmp_path / "a" / "classes.csv")) == 10
    for name in ("novelty", "distance", "histograms", "trajectory"):
        assert (tmp_path / "a" / f"{name}.png").stat().st_size > 5000
    assert "copy" in capsys.readouterr().out
    assert found["seed"] == 0 and "git_revision" in found
    # the second time every answer is remembered, and nothing changes
    assert command(monkeypatch, *options, f"work_dir={tmp_path}/b", "figures=false") == 0
    again = results(tmp_path / "b")
    assert again["new_predictions"] == 0 and again["remembered_predictions"] > 15
    assert again["groups"] == found["groups"] and again["findings"] == found["findings"]
    # results are replaced only when asked for
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, *options, f"work_dir={tmp_path}/b")
    assert stopped.value.code == 2 and "overwrite=true" in capsys.readouterr().err


def test_a_test_program_that_fails_on_one_network_does_not_end_the_evaluation(folders, tmp_path, monkeypatch):
    (tmp_path / "test.py").write_text(PROGRAM)
    options = [
        f"generated={folders}/generated",
        "tester.kind=command",
        f'tester.command=["{{python}}","{tmp_path}/test.py","{{path}}"]',
    ]
    # networks without a file are written in the format of the first that has one
    assert (
        command(
            monkeypatch,
            f"originals={folders}/originals",
            *options,
            f"work_dir={tmp_path}/a",
            "max_originals=2",
            "figures=false",
            "baselines.noise=[0.01]",
            "baselines.noise_repeats=1",
            "baselines.interpolations=0",
        )
        == 0
    )
    found = results(tmp_path / "a")
    assert found["groups"]["generated"]["failed_tests"] == 3  # they are safetensors
    assert found["groups"]["noise 0.01"]["accuracy"]["value"] == 0.75
    assert found["groups"]["original"]["iou_within"] is None
    failed = [row for row in rows(tmp_path / "a" / "networks.csv") if row["error"]]
    assert len(failed) == 3 and all("exit code 1" in row["error"] for row in failed)
    assert all(row["L2"] for row in failed)


def test_weights_alone_are_compared_without_a_tester(folders, tmp_path, monkeypatch):
    assert (
        command(
            monkeypatch,
            f"originals={folders}/originals",
            f"generated={folders}/generated",
            f"work_dir={tmp_path}/a",
            "memory_gb=0.0015",
            "figures=false",
        )
        == 0
    )
    found = results(tmp_path / "a")
    assert found["groups"]["generated"]["accuracy"] is None and found["groups"]["generated"]["distance_smallest"] < 1e-6
    assert found["findings"][0]["passed"] is False
    assert "accuracy is unknown" in json.loads((tmp_path / "a" / "results.json").read_text())["text"]


def test_task_networks_are_judged_by_task_with_regression_and_controls(tmp_path, monkeypatch):
    tasks = [31, 992, 682, 341, 819, 204, 99, 924]
    for number, weights in enumerate(
        train_tasks(tasks, 0, DigitTaskRecipe(trunk_steps=150, steps=60, num_checkpoints=2))
    ):
        for place, task in enumerate(tasks):
            folder = "seen" if place < 6 else "unseen"
            name = f"{number + 1:04d}_acc0.9000_class{task:04d}_digits.pth"
            write_checkpoint(tmp_path / folder / name, unstack(weights, place))
            if number:
                state = perturb(unstack(weights, place), 0.1, torch.Generator().manual_seed(place))
                write_checkpoint(tmp_path / "generated" / f"generated_x_class{task:04d}_001.pth", state)
    assert (
        command(
            monkeypatch,
            f"originals={tmp_path}/seen",
            f"held_out={tmp_path}/unseen",
            *TASKS,
            f"generated={tmp_path}/generated",
            "baselines.noise=[]",
            f"work_dir={tmp_path}/a",
            "figures=false",
        )
        == 0
    )
    found = results(tmp_path / "a")
    assert set(found["groups"]) == {
        "original",
        "generated",
        "generated (unseen tasks)",
        "held out (unseen tasks)",
        "mean of originals",
        "mean of originals (unseen tasks)",
        "ridge regression",
        "ridge regression (unseen tasks)",
        "ridge regression with pairs",
        "ridge regression with pairs (unseen tasks)",
    }
    table = {row["group"]: row for row in rows(tmp_path / "a" / "tasks.csv")}
    assert float(table["generated"]["accuracy"]) > 0.8 > float(table["generated"]["on another task"])
    assert int(table["generated (unseen tasks)"]["tasks"]) == 2
    assert table["generated (unseen tasks)"]["trained"]  # by the held-out networks
    by_task = rows(tmp_path / "a" / "by_task.csv")
    assert [int(row["task"]) for row in by_task if row["group"] == "generated"] == sorted(tasks[:6])
    assert any("own task" in each["claim"] for each in found["findings"])
    assert task_figure([TaskRow(**row) for row in found["tasks"]]).light_png
    assert found["groups"]["generated"]["iou_nearest_original"]["value"] > 0.1
    assert found["groups"]["generated (unseen tasks)"]["iou_nearest_original"] is None


def test_networks_are_drawn_from_a_generator_once_and_its_cost_is_measured(tmp_path, monkeypatch):
    model, codec = tiny_generator()
    save_generator(tmp_path / "generator", model, codec, tiny_facts())
    for place, state in enumerate(networks()):
        write_checkpoint(tmp_path / "originals" / f"{place}.pth", state)
    options = [
        f"originals={tmp_path}/originals",
        f"generator={tmp_path}/generator",
        "num_generated=3",
        "sampling.steps=4",
        f"work_dir={tmp_path}/a",
        "device=cpu",
        "figures=false",
        "overwrite=true",
        "baselines.noise=[0.1]",
    ]
    assert command(monkeypatch, *options, "efficiency.networks=2") == 0
    found = results(tmp_path / "a")
    assert found["groups"]["generated"]["networks"] == 3
    cost = found["efficiency"]
    assert cost["evaluations_per_token"] == 4 and cost["seconds_per_network"] > 0 and cost["peak_memory_gb"] > 0.05
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "networks").rglob("generated_*.pth")}
    assert len(files) == 3
    assert command(monkeypatch, *options) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert results(tmp_path / "a")["groups"]["generated"] == found["groups"]["generated"]


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "nothing to evaluate"),
        (["generated=a", "generator=b"], "both name the generated networks"),
        (["generated={root}/nowhere"], "is no folder"),
        (["generated={root}/empty"], "holds no checkpoint"),
        (["generated={root}/generated", "originals={root}/originals", "pattern=x*"], "fits pattern=x"),
        (["generated={root}/generated", "efficiency.networks=2"], "add generator=RUN"),
        (["generated={root}/generated", "tasks=unseen"], "tasks says what to draw"),
        (["generated={root}/generated", "baselines.noise=[-1]"], "must be at least 0"),
        (
            ["generated={root}/generated", "tester.kind=python", "tester.target=rpg.zoo.digit_tasks:DigitTaskTester"],
            "none of the 4 networks could be tested",
        ),
    ],
)
def test_mistakes_are_named(folders, tmp_path, monkeypatch, capsys, options, message):
    (folders / "empty").mkdir(exist_ok=True)
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, *(option.format(root=folders) for option in options), f"work_dir={tmp_path}/a")
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_networks_of_two_architectures_are_refused(folders, tmp_path):
    write_checkpoint(tmp_path / "other" / "x.pth", networks(1)[0])
    with pytest.raises(DataError, match=r"generated: x.pth: features.0.weight is missing"):
        evaluate(
            EvaluateConfig(
                originals=str(folders / "originals"),
                generated=str(tmp_path / "other"),
                work_dir=str(tmp_path / "a"),
                progress=False,
            )
        )
