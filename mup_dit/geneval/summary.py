"""GenEval's score: mean over tasks of the share of correct images.

Source: specification 6 (GenEval); golden case ``geneval_summary``.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from common.errors import DataError
from common.evaluation.metric import Metric


@dataclass(frozen=True)
class Outcome:
    """One image."""

    tag: str
    prompt: str
    correct: bool


@dataclass(frozen=True)
class Summary:
    """Shares over images, prompts and tasks.

    Attributes:
        tasks: by tag, in order of first appearance: images that are correct, images.
        image_accuracy: share of correct images.
        prompt_accuracy: share of prompts with a correct image.
        score: mean over tasks. Standard errors are over prompts, whose images are not independent.
    """

    images: int
    prompts: int
    tasks: Mapping[str, tuple[int, int]]
    image_accuracy: float
    prompt_accuracy: float
    score: Metric
    task_metrics: tuple[Metric, ...]

    def metrics(self) -> list[Metric]:
        """Everything as named numbers."""
        return [
            self.score,
            *self.task_metrics,
            Metric("geneval_images_correct", self.image_accuracy),
            Metric("geneval_prompts_with_a_correct_image", self.prompt_accuracy),
        ]

    def text(self) -> str:
        """The table as GenEval's own tool prints it."""
        width = 16
        lines = [f"{tag:<{width}} = {right / count:.2%} ({right} / {count})" for tag, (right, count) in
                 self.tasks.items()]  # fmt: skip
        head = [
            f"Total images: {self.images}",
            f"Total prompts: {self.prompts}",
            f"% correct images: {self.image_accuracy:.2%}",
            f"% correct prompts: {self.prompt_accuracy:.2%}",
        ]
        sections = [*_section("Summary", head), "", *_section("Task breakdown", lines)]
        return "\n".join([*sections, "", f"Overall score (avg. over tasks): {self.score.value:.5f}", ""])


def summarize(outcomes: Iterable[Outcome]) -> Summary:
    """Raises: DataError without outcomes."""
    by_prompt: dict[tuple[str, str], list[bool]] = {}
    by_text: dict[str, bool] = {}
    for outcome in outcomes:
        by_prompt.setdefault((outcome.tag, outcome.prompt), []).append(outcome.correct)
        by_text[outcome.prompt] = by_text.get(outcome.prompt, False) or outcome.correct
    if not by_prompt:
        raise DataError("there are no images to summarize.")
    tasks: dict[str, tuple[int, int]] = {}
    shares: dict[str, list[tuple[int, int]]] = {}
    for (tag, _), correct in by_prompt.items():
        right, count = tasks.get(tag, (0, 0))
        tasks[tag] = right + sum(correct), count + len(correct)
        shares.setdefault(tag, []).append((sum(correct), len(correct)))
    metrics = tuple(_task_metric(tag, shares[tag]) for tag in tasks)
    errors = [metric.standard_error for metric in metrics]
    error = None if None in errors else math.hypot(*errors) / len(errors)
    images = sum(count for _, count in tasks.values())
    return Summary(
        images=images,
        prompts=len(by_text),
        tasks=tasks,
        image_accuracy=sum(right for right, _ in tasks.values()) / images,
        prompt_accuracy=sum(by_text.values()) / len(by_text),
        score=Metric("geneval", float(np.mean([metric.value for metric in metrics])), error),
        task_metrics=metrics,
    )


def _task_metric(tag: str, shares: list[tuple[int, int]]) -> Metric:
    """Share of correct images; its error by the ratio estimator over prompts."""
    right_P, count_P = np.array(shares, np.float64).T
    value = float(right_P.sum() / count_P.sum())
    if len(shares) < 2:
        return Metric(f"geneval_{tag}", value)
    residual_P = right_P - value * count_P
    error = math.sqrt(len(shares) / (len(shares) - 1) * float(residual_P @ residual_P)) / float(count_P.sum())
    return Metric(f"geneval_{tag}", value, error)


def _section(title: str, lines: list[str]) -> list[str]:
    return [title, "=" * len(title), *lines]
