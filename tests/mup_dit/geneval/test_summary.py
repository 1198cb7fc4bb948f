"""Shares and their standard errors; the table itself is a golden case."""

import pytest

from common.errors import DataError
from mup_dit.geneval.summary import Outcome, summarize


def test_score_is_the_mean_over_tasks_and_not_over_images():
    rows = [Outcome("colors", "a", True)] * 4 + [Outcome("position", "b", False)] * 12
    found = summarize(rows)
    assert found.score.value == 0.5 and found.image_accuracy == 0.25 and found.prompt_accuracy == 0.5
    assert found.score.standard_error is None  # one prompt a task says nothing about others


def test_images_of_a_prompt_are_one_observation():
    rows = [Outcome("colors", str(prompt), prompt % 2 == 0) for prompt in range(10) for _ in range(4)]
    error = summarize(rows).task_metrics[0].standard_error
    assert error == pytest.approx((0.25 / 9) ** 0.5)  # of ten prompts, not of forty images


def test_nothing_to_summarize_is_refused():
    with pytest.raises(DataError, match="no images"):
        summarize([])
