"""Requests: tasks, vectors and features as conditions; states by rule; nothing depends on the number of requests."""

import json
from pathlib import Path

import pytest

from common.errors import ConfigError, DataError
from rpg.requests import (
    Condition,
    build_requests,
    feature_conditions,
    read_states,
    safe_label,
    task_conditions,
    vector_conditions,
)
from rpg.tasks import HELD_OUT_TASKS, task_bits

GROUPS = ("seed0000", "seed0001", "seed0002")


def test_requests_are_numbered_per_condition():
    conditions = [Condition((0.0,), "a"), Condition((1.0,), "b")]
    requests = build_requests(conditions, 2, seed=0, first={"b": 5})
    assert [(request.label, request.index) for request in requests] == [("a", 0), ("a", 1), ("b", 5), ("b", 6)]
    assert all(request.state is None for request in requests)
    with pytest.raises(ConfigError, match="a is asked for twice"):
        build_requests([conditions[0], conditions[0]], 1, seed=0)


def test_random_states_depend_on_seed_and_number_only():
    few, many = ([request.state for request in build_requests(None, count, seed=3, groups=GROUPS)] for count in (5, 40))
    assert many[:5] == few
    assert set(many) == {0, 1, 2}
    assert many != [request.state for request in build_requests(None, 40, seed=4, groups=GROUPS)]


@pytest.mark.parametrize(
    "states, expected",
    [
        ("balanced", [0, 1, 2, 0]),
        ("none", [None] * 4),
        ([2, 0], [2, 0, 2, 0]),
        ("seed0001", [1] * 4),
        (["seed0001", 2], [1, 2, 1, 2]),
        (1, [1] * 4),
    ],
)
def test_states_by_rule_or_name(states, expected):
    assert [request.state for request in build_requests(None, 4, seed=0, states=states, groups=GROUPS)] == expected


@pytest.mark.parametrize("states", [3, [0, -1], "seed0009", [True], []])
def test_states_that_do_not_exist_are_refused(states):
    with pytest.raises(ConfigError, match="states="):
        read_states(states, GROUPS)


def test_states_of_a_generator_without_any():
    assert read_states("auto", ()) == ("none", ())
    with pytest.raises(ConfigError, match="no permutation states"):
        read_states("random", ())


def test_unseen_tasks_are_the_held_out_ones_that_were_not_trained_on():
    assert [c.label for c in task_conditions("unseen")] == [f"class{task:04d}" for task in HELD_OUT_TASKS]
    trained = HELD_OUT_TASKS[:5]
    unseen = task_conditions("unseen", trained=trained, num_tasks=3)
    assert [condition.label for condition in unseen] == [f"class{task:04d}" for task in HELD_OUT_TASKS[5:8]]
    assert unseen[0].values == tuple(map(float, task_bits(HELD_OUT_TASKS[5])))
    with pytest.raises(ConfigError, match="all held-out"):
        task_conditions("unseen", trained=range(1, 1023))


def test_seen_tasks_are_drawn_from_those_trained_on():
    seen = task_conditions("seen", trained=range(1, 200), seed=1)
    assert len(seen) == 20
    assert len({condition.label for condition in seen}) == 20
    assert seen == task_conditions("seen", trained=range(1, 200), seed=1)
    assert seen != task_conditions("seen", trained=range(1, 200), seed=2)
    assert len(task_conditions("seen", trained=[4, 5], num_tasks=7)) == 2


@pytest.mark.parametrize("tasks", [0, 1023, [5, 2000], "unsee", [], [1.5]])
def test_tasks_that_do_not_exist_are_refused(tasks):
    with pytest.raises(ConfigError, match="tasks"):
        task_conditions(tasks)


def test_vectors_are_labelled_by_their_task():
    (one,) = vector_conditions(list(task_bits(793)), 10)
    assert (one.label, len(one.values)) == ("class0793", 10)
    first, second = vector_conditions([[0.5, 1.0], [1, 0]], 2)
    assert (first.label, second.label) == ("vector0000", "vector0001")
    for vectors, message in (([[1, 0, 1]], "3 entries.*2 finite"), ([["a", 1]], "'a' is no number"), ([], "nothing")):
        with pytest.raises(ConfigError, match=message):
            vector_conditions(vectors, 2)


def test_features_come_from_a_table(tmp_path: Path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"sub/0001_class0005_x.pth": [0.5, 1.5], "a b": [1, 2]}))
    first, second = feature_conditions(path, 2)
    assert (first.label, first.values) == ("0001-class0005-x", (0.5, 1.5))
    assert second.label == "a-b"
    with pytest.raises(ConfigError, match="'a b'|class0005"):
        feature_conditions(path, 3)
    path.write_text("[]")
    with pytest.raises(DataError, match="label"):
        feature_conditions(path, 2)
    with pytest.raises(DataError, match="no readable"):
        feature_conditions(tmp_path / "missing.json", 2)


def test_labels_are_safe_in_file_names():
    assert safe_label("../a b/ö?") == "a-b-ö"
    assert safe_label("///") == "item"
    assert len(safe_label("x" * 200)) == 60
