"""The task networks on embedded digits: choice of tasks, ensemble, names, tester."""

import pytest
import torch

from common.errors import ConfigError, DataError
from rpg.tasks import HELD_OUT_TASKS, parse_name, task_bits
from rpg.zoo.digit_tasks import (
    KEYS,
    DigitTaskRecipe,
    DigitTaskTester,
    choose_tasks,
    flat_images,
    named_networks,
    predictions,
    stack,
    targets,
    train_tasks,
)

SHORT = DigitTaskRecipe(trunk_steps=200, steps=60, num_checkpoints=2)
TASKS = [1, 341, 793, 1022]


@pytest.fixture(scope="module")
def collected():
    return list(named_networks(TASKS, 0, SHORT))


def test_tasks_are_disjoint_and_held_out_ones_stay_unseen():
    seen, unseen = choose_tasks(400, 60, 0)
    assert (len(set(seen)), len(set(unseen))) == (400, 60)
    assert not set(seen) & set(unseen)
    assert set(HELD_OUT_TASKS) <= set(unseen)
    assert choose_tasks(400, 60, 0) == (seen, unseen) != choose_tasks(400, 60, 1)
    assert len(choose_tasks(1002, 20, 0)[0]) == 1002
    with pytest.raises(ConfigError, match="num_seen=1003"):
        choose_tasks(1003, 20, 0)


def test_networks_learn_their_task(collected):
    for name, _ in collected:
        bits = task_bits(name.task)
        majority = max(sum(bits), 10 - sum(bits)) / 10
        assert name.accuracy > max(0.9, majority - 0.02)


def test_checkpoints_have_two_layers_of_the_trunk_and_a_head(collected):
    _, state = collected[0]
    assert tuple(state) == KEYS
    assert sum(value.numel() for value in state.values()) == 3202


def test_names_number_the_checkpoints_of_every_task(collected):
    found = [parse_name(name.file_name()) for name, _ in collected]
    assert [(name.index, name.task) for name in found] == [(n, task) for n in (1, 2) for task in TASKS]


def test_a_task_does_not_depend_on_the_others_trained_with_it(collected):
    weights = next(train_tasks([793], 0, SHORT))
    state = next(state for name, state in collected if name.task == 793)
    for key in KEYS:
        torch.testing.assert_close(weights[key][0], state[key], rtol=1e-3, atol=1e-4)


def test_tester_and_ensemble_agree(collected):
    states = [state for _, state in collected[:4]]
    _, _, _, label_N = flat_images()
    answers_TN, target_TN = predictions(states), targets(TASKS, label_N)
    for row, (task, state) in enumerate(zip(TASKS, states, strict=True)):
        predicted_N, target_N = DigitTaskTester(task).predict(state)
        assert torch.equal(target_N, target_TN[row])
        assert torch.equal(predicted_N, answers_TN[row])
        assert torch.equal(DigitTaskTester().predict(state, task=task)[0], predicted_N)


def test_targets_follow_the_ten_bits():
    label_N = torch.arange(10)
    assert targets([1], label_N)[0].tolist() == [0] * 9 + [1]
    assert targets([512], label_N)[0].tolist() == [1] + [0] * 9


def test_mistakes_name_option_value_and_remedy(collected):
    state = dict(collected[0][1])
    with pytest.raises(ConfigError, match="1023"):
        DigitTaskTester(1023)
    with pytest.raises(ConfigError, match="task"):
        DigitTaskTester().predict(state)
    with pytest.raises(ConfigError, match="batch_size=0"):
        DigitTaskRecipe(batch_size=0)
    with pytest.raises(DataError, match="w1"):
        stack([{**state, "w1": state["w1"][:3]}])
