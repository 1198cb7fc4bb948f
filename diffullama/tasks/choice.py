"""Multiple choice: HellaSwag, Winogrande, PIQA and SIQA, as the released evaluation words them.

By diffusion, the continuation with the lowest bound per token is chosen; by the autoregressive parent, that with the
highest mean or summed log-likelihood, as each task's baseline has it. Source: specification 6.1 and 6.2.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from common.errors import DataError
from common.evaluation.metric import Metric, mean_metric
from diffullama.scoring import ChoiceItem, ScoringRule, causal_items, score_items
from diffullama.tasks.context import Context, Outcome, by_item, grouped
from diffullama.tasks.dataset import Row, Source


@dataclass(frozen=True)
class Question:
    """A prefix and its continuations; a continuation's parts are encoded one by one.

    Attributes:
        label: number of the right continuation.
    """

    prefix: str
    continuations: Sequence[Sequence[str]]
    label: int


@dataclass(frozen=True, kw_only=True)
class ChoiceTask:
    """How rows of a data set become questions.

    Attributes:
        reduce: the baseline's score is the ``mean`` or the ``sum`` of the log-likelihoods.
    """

    name: str
    source: Source
    read: Callable[[Row], Question]
    reduce: str


def hellaswag(row: Row) -> Question:
    """Topic and context, then each ending, encoded without a space before it."""
    query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Question(clean(query), [[clean(ending)] for ending in row["endings"]], int(row["label"]))


def clean(text: str) -> str:
    """Without WikiHow's markers: `` [title]`` ends a sentence, other brackets go, double spaces shrink."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def winogrande(row: Row) -> Question:
    """What stands before the gap; then an option and the rest of the sentence, all of which is scored."""
    before, gap, rest = row["sentence"].partition("_")
    if not gap:
        raise DataError(f"a sentence of winogrande has no gap '_': {row['sentence']!r}.")
    return Question(before, [[row["option1"], rest], [row["option2"], rest]], int(row["answer"]) - 1)


def piqa(row: Row) -> Question:
    """A goal, and a solution after a space."""
    solutions = [[" " + row["sol1"]], [" " + row["sol2"]]]
    return Question(f"Question: {row['goal']}\nAnswer: ", solutions, int(row["label"]))


def siqa(row: Row) -> Question:
    """A situation with a question, and an answer."""
    answers = [[row["answerA"]], [row["answerB"]], [row["answerC"]]]
    return Question(f"Question: {row['context']} {row['question']}\nAnswer: ", answers, int(row["label"]) - 1)


def _columns(*names: str) -> dict[str, tuple[str]]:
    return {name: (name,) for name in names}


CHOICE_TASKS = {
    task.name: task
    for task in (
        ChoiceTask(
            name="hellaswag",
            source=Source(
                hub="Rowan/hellaswag", columns=_columns("activity_label", "ctx_a", "ctx_b", "endings", "label")
            ),
            read=hellaswag,
            reduce="mean",
        ),
        ChoiceTask(
            name="winogrande",
            source=Source(
                hub="allenai/winogrande",
                config="winogrande_xl",
                columns=_columns("sentence", "option1", "option2", "answer"),
            ),
            read=winogrande,
            reduce="mean",
        ),
        ChoiceTask(
            name="piqa",
            source=Source(hub="baber/piqa", columns=_columns("goal", "sol1", "sol2", "label")),
            read=piqa,
            reduce="sum",
        ),
        ChoiceTask(
            name="siqa",
            source=Source(
                hub="lighteval/siqa",
                columns=_columns("context", "question", "answerA", "answerB", "answerC", "label"),
            ),
            read=siqa,
            reduce="sum",
        ),
    )
}


class ChoiceEvaluation:
    """A multiple-choice task on a model; an ``Evaluation``.

    Raises: DataError for a row that is no question.
    """

    def __init__(self, task: ChoiceTask, rows: Sequence[Row], context: Context, rule: ScoringRule) -> None:
        self.task, self.context, self.rule = task, context, rule
        self.questions = [_read(task, row, number) for number, row in enumerate(rows)]
        self.items = [self._encode(question) for question in self.questions]
        lengths = [len(item.prefix) + max(map(len, item.continuations)) for item in self.items]
        self._groups = grouped(lengths, context.group_size)
        self.settings = {"rule": {"reduce": task.reduce} if context.causal else asdict(rule)}

    @property
    def num_groups(self) -> int:
        return len(self._groups)

    def _encode(self, question: Question) -> ChoiceItem:
        encode = self.context.tokenizer.encode
        continuations = [[token for part in parts for token in encode(part)] for parts in question.continuations]
        prefix = self.context.prefix_ids(question.prefix)
        return ChoiceItem(self.context.cut_prefix(prefix, max(map(len, continuations))), continuations)

    def run(self, group: int) -> dict[str, Any]:
        numbers = self._groups[group]
        items, context = [self.items[number] for number in numbers], self.context
        if context.causal:
            found = causal_items(context.model, items, self.task.reduce, batch_size=context.batch_size)
        else:
            found = score_items(
                context.model, items, self.rule, keys=numbers, seed=context.seed, batch_size=context.batch_size
            )
        records = []
        for number, scores in zip(numbers, found, strict=True):
            margin, error = scores.margin()
            label = self.questions[number].label
            records.append(
                {
                    "item": number,
                    "scores": scores.scores_C.tolist(),
                    "choice": scores.best,
                    "label": label,
                    "correct": scores.best == label,
                    "margin": margin,
                    "margin_error": error,
                }
            )
        return {"items": records}

    def summary(self, records: Sequence[Mapping[str, Any]]) -> Outcome:
        items = by_item(records)
        metrics = [mean_metric("accuracy", [100.0 * item["correct"] for item in items])]
        if all(item["margin_error"] is not None for item in items):
            undecided = [100.0 * (item["margin"] < 2 * item["margin_error"]) for item in items]
            metrics.append(Metric("undecided", sum(undecided) / len(undecided)))
        return Outcome(metrics, items, {"items": len(items)})


def _read(task: ChoiceTask, row: Row, number: int) -> Question:
    try:
        question = task.read(row)
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"data.{task.name}, row {number}: not a question of {task.name} ({error}).") from None
    if not 0 <= question.label < len(question.continuations):
        raise DataError(
            f"data.{task.name}, row {number}: label {question.label} is none of {len(question.continuations)} answers; "
            "use a split with labels."
        )
    return question
