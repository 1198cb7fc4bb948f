"""Task numbers, class vectors, the names of checkpoint files, the focal loss."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from common.errors import ConfigError, DataError
from rpg.tasks import (
    HELD_OUT_TASKS,
    CheckpointName,
    class_vector,
    focal_loss,
    majority_rate,
    parse_name,
    seen_tasks,
    task_bits,
    task_in_name,
    task_of_vector,
    task_targets,
)


@given(st.integers(1, 1022))
def test_a_task_survives_the_way_to_its_class_vector_and_back(task):
    assert task_of_vector(class_vector(task).tolist()) == task


def test_the_first_class_is_the_highest_bit():
    assert task_bits(512) == (1, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    assert task_bits(279) == (0, 1, 0, 0, 0, 1, 0, 1, 1, 1)


@pytest.mark.parametrize("task", [0, 1023, -3, 1.5, True, "7"])
def test_numbers_that_are_no_task_are_refused(task):
    with pytest.raises(ConfigError, match="1 to 1022"):
        task_bits(task)


@pytest.mark.parametrize(
    "vector, reason", [([1, 0, 1], "3 entries"), ([0.5] * 10, "0 or 1"), ([0] * 10, "one side"), ([1] * 10, "one side")]
)
def test_vectors_that_are_no_task_are_refused(vector, reason):
    with pytest.raises(ConfigError, match=reason):
        task_of_vector(vector)


def test_held_out_tasks_are_not_seen():
    assert len(HELD_OUT_TASKS) == 20
    assert len(seen_tasks()) == 1002 and not set(seen_tasks()) & set(HELD_OUT_TASKS)


def test_targets_follow_the_class_vector():
    labels = torch.arange(10)
    assert task_targets(labels, 279).tolist() == list(task_bits(279))
    assert majority_rate(labels, 1) == 0.9


def test_a_released_file_name_is_read():
    name = parse_name("checkpoint_test/0001_acc0.9717_class0793_condition_cifar10_vittiny.pth")
    assert name == CheckpointName(1, 0.9717, "condition_cifar10_vittiny", "class", 793)
    assert (name.task, name.seed) == (793, None)


@given(
    index=st.integers(0, 99999),
    accuracy=st.integers(0, 10000),
    condition=st.sampled_from([(None, None), ("class", 5), ("class", 1022), ("seed", 0), ("seed", 12345)]),
    tag=st.from_regex(r"[a-z]\w{0,12}", fullmatch=True).filter(lambda tag: not tag.startswith(("class", "seed"))),
    suffix=st.sampled_from([".pth", ".safetensors", ""]),
)
def test_a_name_that_was_written_is_read(index, accuracy, condition, tag, suffix):
    name = CheckpointName(index, accuracy / 10000, tag, *condition)
    assert parse_name(name.file_name(suffix)) == name


def test_other_names_say_nothing():
    assert parse_name("model_best.pth") is None
    assert task_in_name("model_best.pth") is None


def test_a_generated_name_says_its_task():
    assert task_in_name("out/generated_quick_class0279_001.pth") == 279
    assert task_in_name("generated_quick_subclass0279.pth") is None


def test_a_name_with_a_task_that_does_not_exist_is_an_error():
    with pytest.raises(DataError, match="task 1023"):
        parse_name("0001_acc0.5000_class1023_x.pth")


def test_focal_loss_without_focus_is_cross_entropy():
    logits, targets = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    assert torch.allclose(focal_loss(logits, targets, gamma=0.0), F.cross_entropy(logits, targets))


def test_focal_loss_of_sure_answers_has_finite_gradients():
    logits = torch.tensor([[80.0, -80.0], [-80.0, 80.0]], requires_grad=True)
    focal_loss(logits, torch.tensor([0, 0])).backward()
    assert logits.grad.isfinite().all() and logits.grad[0].abs().max() == 0


def test_the_task_is_found_in_labels_made_of_file_names():
    assert task_in_name("generated_digits_0001-acc0.9650-class0314-tasks_001.pth") == 314
    assert task_in_name("generated_subclass0314_001.pth") is None
