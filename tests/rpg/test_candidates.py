"""Which networks are compared, and what each is made of."""

import pytest
import torch

from common.errors import DataError
from rpg.baselines import RidgeRegression
from rpg.candidates import (
    MEAN,
    MEAN_GENERATED,
    RIDGE,
    RIDGE_PAIRS,
    UNSEEN,
    Network,
    build_groups,
    from_folder,
    noised,
    split_by_task,
    tasks_of,
)
from rpg.checkpoint_files import write_checkpoint
from rpg.evaluation import training_runs
from rpg.examination import Examined
from rpg.task_report import TaskRow, another_task, judge_tasks
from rpg.tasks import class_vectors


def fixed(name: str, value: float, task: int | None = None) -> Network:
    return Network(name, lambda: {"w": torch.full((4,), value) + torch.arange(4.0)}, task)


ORIGINALS = [fixed(str(place), float(place)) for place in range(6)]


def test_files_are_found_in_order_with_their_tasks(tmp_path):
    for name in ("b/0002_acc0.5_class0007_x.pth", "a/0001_acc0.5_class0793_x.safetensors", "notes.txt"):
        path = tmp_path / name
        if path.suffix == ".txt":
            path.write_text("no network")
        else:
            write_checkpoint(path, {"w": torch.ones(2)})
    found = from_folder(tmp_path, "originals")
    assert [(network.name, network.task) for network in found] == [
        ("a/0001_acc0.5_class0793_x.safetensors", 793),
        ("b/0002_acc0.5_class0007_x.pth", 7),
    ]
    assert torch.equal(found[0].load()["w"], torch.ones(2))
    assert len(from_folder(tmp_path, "originals", limit=1)) == 1
    with pytest.raises(DataError, match="holds no checkpoint that fits pattern=c"):
        from_folder(tmp_path, "originals", "c*")


def test_noise_is_drawn_from_the_seed_alone():
    first, again = (noised(ORIGINALS, 0.1, 4, seed=3) for _ in range(2))
    assert [network.name for network in first] == [network.name for network in again]
    assert len({network.name.split(" + ")[0] for network in first}) == 4  # without replacement
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.load()["w"], other.load()["w"]) and torch.equal(one.load()["w"], one.load()["w"])
    assert not torch.equal(first[0].load()["w"], noised(ORIGINALS, 0.1, 4, seed=4)[0].load()["w"])
    assert len(noised(ORIGINALS[:2], 0.1, 5, seed=0)) == 5


def test_groups_without_tasks():
    groups = build_groups(ORIGINALS, ORIGINALS[:2], seed=0, noise_levels=[0.1, 0.2], interpolations=3, regression=True)
    assert {name: len(networks) for name, networks in groups.items()} == {
        "original": 6, "generated": 2, "noise 0.1": 5, "noise 0.2": 5, MEAN: 1, "interpolated": 3, MEAN_GENERATED: 1,
    }  # fmt: skip
    assert torch.equal(groups[MEAN][0].load()["w"], 2.5 + torch.arange(4.0))
    assert list(build_groups([], ORIGINALS[:1], seed=0, noise_levels=[0.1])) == ["generated"]


def test_groups_of_task_networks_are_split_into_seen_and_unseen():
    originals = [fixed(f"o{task}", float(task), task) for task in (1, 2, 4, 8)]
    generated = [fixed("g1", 1.0, 1), fixed("g3", 3.0, 3)]
    groups = split_by_task(
        build_groups(originals, generated, [fixed("h3", 3.0, 3)], seed=0, interpolations=2, regression=True)
    )
    assert {name: tasks_of(networks) for name, networks in groups.items()} == {
        "original": [1, 2, 4, 8], "generated": [1], f"generated{UNSEEN}": [3], f"held out{UNSEEN}": [3], MEAN: [1],
        MEAN + UNSEEN: [3], RIDGE: [1], RIDGE + UNSEEN: [3], RIDGE_PAIRS: [1], RIDGE_PAIRS + UNSEEN: [3],
    }  # fmt: skip
    fitted = RidgeRegression(class_vectors([1, 2, 4, 8]), (network.load() for network in originals))
    expected = fitted.predict(class_vectors([3])[0])["w"]
    torch.testing.assert_close(groups[RIDGE + UNSEEN][0].load()["w"], expected)


def test_regression_needs_tasks_in_all_names():
    with pytest.raises(DataError, match=r"^5 has no task in its name.*regression=false"):
        build_groups([*ORIGINALS[5:], fixed("o", 0.0, 3)], [], seed=0, regression=True)


def test_every_task_gets_another_one_as_control():
    tasks = [3, 5, 9, 100, 793]
    others = another_task(tasks, 0)
    assert sorted(others) == sorted(others.values()) == tasks and all(task != other for task, other in others.items())
    assert another_task([3], 0) == {}


def test_trajectories_join_checkpoints_of_one_training():
    names = ["0001_acc0.9_seed0000_x.pth", "0002_acc0.9_seed0000_x.pth", "0001_acc0.9_seed0001_x.pth", "b/0001.pth",
             "b/0002.pth", "b/0003.pth"]  # fmt: skip
    group = Examined([fixed(name, 0.0) for name in names], torch.zeros(6, 4))
    group.finite = [True, True, True, True, False, True]
    assert training_runs(group) == [[0, 1], [3, 4]]  # places among the finite ones
    assert training_runs(None) == []


def test_tasks_are_judged_by_the_majority_answer_and_by_another_task():
    def rows(group, accuracy, wrong_task):
        return [TaskRow(group, task, 1, accuracy, 0.7, wrong_task, None) for task in (3, 5)]

    good = judge_tasks([*rows("original", 0.98, 0.5), *rows("generated", 0.9, 0.5), *rows("noise 0.1", 0.1, 0.1)])
    assert [each.passed for each in good] == [True, True] and all("(seen tasks)" in each.claim for each in good)
    indifferent = judge_tasks([*rows("original", 0.98, 0.5), *rows(f"generated{UNSEEN}", 0.5, 0.5)])
    assert [each.passed for each in indifferent] == [False, False] and "unseen" in indifferent[0].claim
    alone = judge_tasks(rows("generated", 0.9, None))
    assert len(alone) == 1 and "tasks)" not in alone[0].claim
