"""Tasks whose answer is text: the canvas holds a prefix, masks for the answer, perhaps a suffix; a grade per item.

How many masks there are is the gold answer's length (except for arithmetic), as in the released evaluation, so numbers
of such tasks compare only with others that know it too. The autoregressive parent continues the prefix greedily by as
many tokens, without seeing a suffix. Source: specification 6.2.

Dimensions: B items of a group, L positions of a canvas.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from common.config import require_at_least
from common.diffusion.categorical import TokenDraw
from common.errors import DataError
from common.evaluation.metric import mean_metric
from diffullama.metrics import contains_answer, gsm_answer, rouge_each, token_f1
from diffullama.sampler import SamplerOptions, fill
from diffullama.special_tokens import find_family, isolate_digits
from diffullama.tasks.context import Context, Outcome, by_item, grouped, row_tensor
from diffullama.tasks.dataset import Row, Source

KNOWS_LENGTH = "the number of masked tokens is the reference answer's: compare only with results that know it too"
GSM_LENGTH, GSM_STEPS = 256, 64
PROGRAM_TOKENS = 1000  # longer programs are left out, as in the released evaluation


@dataclass(frozen=True)
class Blank:
    """A gap to fill, as text or ids.

    Attributes:
        prefix, suffix: ids around the gap; the prefix holds what begins a sequence.
        free: positions of the gap.
        references: right answers.
        fields: what a record keeps beside prediction and grade.
    """

    prefix: list[int]
    free: int
    references: Sequence[str]
    suffix: list[int] = field(default_factory=list)
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.prefix) + self.free + len(self.suffix)


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """How rows of a data set become gaps, and how fillings are graded.

    Attributes:
        read: None for a row that is left out.
        grade: from a prediction and its gap to values by metric name; shares are in percent.
        limit: first rows that are used; None: all.
        draw: how the released evaluation draws tokens.
        steps: network calls at most; None: one for each token.
        stops: the answer may end before the gap does, by an end-of-text or padding token.
        notes: see ``Outcome``.
    """

    name: str
    source: Source
    read: Callable[[Row, Context], Blank | None]
    grade: Callable[[str, Blank], dict[str, float]]
    limit: int | None = None
    draw: TokenDraw = field(default_factory=TokenDraw)
    steps: int | None = None
    stops: bool = False
    notes: tuple[str, ...] = (KNOWS_LENGTH,)


@dataclass(frozen=True, kw_only=True)
class FillOptions:
    """How gaps are filled by diffusion; null takes the task's own choice, which is the released evaluation's.

    Attributes:
        order: see ``sampler.SamplerOptions``.
        steps: network calls at most.
        temperature: 0 draws greedily.
        top_p: keeps the likeliest tokens of that mass.
        block_length: fills blocks from left to right.
    """

    order: str = "confidence"
    steps: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    block_length: int | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None:
            require_at_least("fill.temperature", self.temperature, 0)
        self.sampler(None, TokenDraw())

    def draw(self, default: TokenDraw) -> TokenDraw:
        """How tokens are drawn."""
        if self.temperature is None and self.top_p is None:
            return default
        temperature = default.temperature if self.temperature is None else self.temperature
        if temperature == 0:
            return TokenDraw(strategy="greedy")
        if self.top_p is None:
            return TokenDraw(temperature=temperature)
        return TokenDraw(strategy="top_p", para=self.top_p, temperature=temperature)

    def sampler(self, steps: int | None, draw: TokenDraw) -> SamplerOptions:
        """Options of ``fill`` for a task with these defaults."""
        return SamplerOptions(
            order=self.order, steps=self.steps or steps, block_length=self.block_length, draw=self.draw(draw)
        )


# ---------------------------------------------------------------- reading rows


def lambada(row: Row, context: Context) -> Blank | None:
    """A passage without its last word."""
    before, space, word = row["text"].strip().rpartition(" ")
    if not space:
        raise DataError(f"a passage of lambada has a single word: {row['text']!r}.")
    encode = context.tokenizer.encode
    free = len(encode(f"{before} {word}")) - len(encode(before))
    if free < 1:
        return None
    prefix = context.cut_prefix(context.prefix_ids(before), free)
    return Blank(prefix, free, [word], fields={"prefix": before})


def _question(context: Context, prompt: str, answers: Sequence[str]) -> Blank | None:
    """A question, and masks for the longest answer."""
    free = max((len(context.tokenizer.encode(answer)) for answer in answers), default=0)
    if free < 1:
        return None
    return Blank(context.cut_prefix(context.prefix_ids(prompt), free), free, list(answers), fields={"question": prompt})


def triviaqa(row: Row, context: Context) -> Blank | None:
    """A question without context; every alias is a right answer."""
    answers = row["answer"]["aliases"] or [row["answer"]["value"]]
    return _question(context, f"Question: {row['question'].rstrip('?')}?\nAnswer: ", answers)


def squad(row: Row, context: Context) -> Blank | None:
    """A paragraph and a question on it."""
    prompt = f"{row['context']}\nQuestion: {row['question'].rstrip('?')}?\nAnswer: "
    return _question(context, prompt, row["answers"]["text"])


def rocstories(row: Row, context: Context) -> Blank | None:
    """A story of five sentences without its third."""
    encode = context.tokenizer.encode
    before, after = f"{row['first']} {row['second']}", f" {row['fourth']} {row['fifth']}"
    free, suffix = len(encode(f" {row['third']}")), encode(after)
    prefix = context.cut_prefix(context.prefix_ids(before), free + len(suffix))
    return Blank(prefix, free, [row["third"]], suffix, {"prefix": before, "suffix": after.strip()})


STORY_COLUMNS = (  # the first four sentences, two endings, the number of the right one
    (*(f"input_sentence_{n}" for n in (1, 2, 3, 4)), "sentence_quiz1", "sentence_quiz2", "answer_right_ending"),
    (*(f"InputSentence{n}" for n in (1, 2, 3, 4)), "RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2",
     "AnswerRightEnding"),
)  # fmt: skip


def story_sentences(row: Row) -> dict[str, str]:
    """The five sentences of a row: of the cloze test (from the hub, or its csv file), or of ROCStories itself."""
    names = next((names for names in STORY_COLUMNS if names[0] in row), None)
    if names is not None:
        sentences = [*(row[name] for name in names[:4]), row[names[3 + int(row[names[6]])]]]
    elif "sentence1" in row:
        sentences = [row[f"sentence{number}"] for number in (1, 2, 3, 4, 5)]
    else:
        raise DataError(
            f"data.rocstories has none of the columns {STORY_COLUMNS[0][0]}, {STORY_COLUMNS[1][0]}, sentence1, ... "
            f"of the cloze test or of ROCStories; its columns are {', '.join(row)}."
        )
    return dict(zip(("first", "second", "third", "fourth", "fifth"), sentences, strict=True))


def gsm8k(row: Row, context: Context) -> Blank | None:
    """A prompt laid out as in fine-tuning: beginning, prompt, separator, then masks up to the trained length."""
    special = context.special
    separator = [] if special.sep_id is None else [special.sep_id]
    length = min(GSM_LENGTH, context.max_length)
    family = find_family(context.model.config, context.tokenizer)
    if family is not None and family.isolates_digits:
        prompt = isolate_digits(context.tokenizer, row["question"])
    else:
        prompt = context.tokenizer.encode(row["question"])
    prefix = [context.beginning, *prompt[: length // 2], *separator]
    return Blank(prefix, length - len(prefix), [row["answer"]], fields={"prompt": row["question"]})


def program_line(row: Row, context: Context) -> Blank | None:
    """A program without one line; None if it is too long."""
    encode = context.tokenizer.encode
    prefix, suffix = context.prefix_ids(row["prompt"]), encode(row["suffix"])
    free = len(encode(row["solution"]))
    if not free or len(prefix) + free + len(suffix) > min(PROGRAM_TOKENS, context.max_length):
        return None
    return Blank(prefix, free, [row["solution"]], suffix, {"task_id": row["task_id"]})


# ---------------------------------------------------------------- grading


def exact_word(prediction: str, blank: Blank) -> dict[str, float]:
    """Whether the stripped text is the word."""
    return {"accuracy": 100.0 * (prediction.strip() == blank.references[0].strip())}


def answer_grade(prediction: str, blank: Blank) -> dict[str, float]:
    """Whether an answer occurs in the text, and the best token F1."""
    return {
        "accuracy": 100.0 * contains_answer(prediction, blank.references),
        "f1": 100.0 * token_f1(prediction, blank.references),
    }


def rouge_grade(prediction: str, blank: Blank) -> dict[str, float]:
    """ROUGE-1, 2, L and their mean."""
    return rouge_each(prediction, blank.references[0])


def gsm_grade(prediction: str, blank: Blank) -> dict[str, float]:
    """Equality of what follows the last ``####``."""
    return {"accuracy": 100.0 * (gsm_answer(prediction) == gsm_answer(blank.references[0]))}


def exact_line(prediction: str, blank: Blank) -> dict[str, float]:
    """Whether the line is the reference's."""
    return {"exact_match": 100.0 * (prediction.strip() == blank.references[0].strip())}


GREEDY = TokenDraw(strategy="greedy")
TEXT_TASKS = {
    task.name: task
    for task in (
        TextTask(
            name="lambada",
            source=Source(
                hub="EleutherAI/lambada_openai", config="default", split="test", columns={"text": ("text", "sentence")}
            ),
            read=lambada,
            grade=exact_word,
        ),
        TextTask(
            name="triviaqa",
            source=Source(
                hub="mandarjoshi/trivia_qa",
                config="rc.nocontext",  # the questions and answers of rc without its gigabytes of documents
                columns={"question": ("question",), "answer": ("answer",)},
            ),
            read=triviaqa,
            grade=answer_grade,
            limit=2000,
        ),
        TextTask(
            name="squad",
            source=Source(
                hub="rajpurkar/squad",
                columns={"context": ("context",), "question": ("question",), "answers": ("answers",)},
            ),
            read=squad,
            grade=answer_grade,
            limit=2000,
            notes=(KNOWS_LENGTH, "the released evaluation reports this task under the name of TriviaQA"),
        ),
        TextTask(
            name="rocstories",
            source=Source(hub="juletxara/xstory_cloze", config="en", split="train+eval"),
            read=lambda row, context: rocstories(story_sentences(row), context),
            grade=rouge_grade,
            limit=1000,
        ),
        TextTask(
            name="gsm8k",
            source=Source(
                hub="openai/gsm8k",
                config="main",
                split="test",
                columns={
                    "question": ("instruction", "question", "prompt"),
                    "answer": ("output", "answer", "response"),
                },
            ),
            read=gsm8k,
            grade=gsm_grade,
            draw=GREEDY,
            steps=GSM_STEPS,
            stops=True,
            notes=("for models that were fine-tuned on such pairs; the prompt has no examples",),
        ),
        TextTask(
            name="humaneval_infill",
            source=Source(
                hub="loubnabnl/humaneval_infilling",
                config="HumanEval-SingleLineInfilling",
                split="test",
                columns={
                    "task_id": ("task_id",),
                    "prompt": ("prompt",),
                    "suffix": ("suffix",),
                    "solution": ("canonical_solution",),
                    "test": ("test",),
                    "entry_point": ("entry_point",),
                },
            ),
            read=program_line,
            grade=exact_line,
        ),
    )
}


# ---------------------------------------------------------------- the evaluation


class TextEvaluation:
    """A text task on a model; an ``Evaluation``.

    Raises: DataError for a row that does not fit the task, or no row at all.
    """

    def __init__(self, task: TextTask, rows: Sequence[Row], context: Context, options: FillOptions) -> None:
        self.task, self.context = task, context
        self.rows: list[Row] = []
        self.blanks: list[Blank] = []
        for number, row in enumerate(rows):
            blank = self._read(row, number)
            if blank is not None:
                self.rows.append(row)
                self.blanks.append(blank)
        self.skipped = len(rows) - len(self.blanks)
        if not self.blanks:
            raise DataError(f"data.{task.name}: none of {len(rows)} rows can be used; see the task's limits.")
        self.sampler = options.sampler(task.steps, task.draw)
        # canvases of one shape share network calls; the parent needs prefixes and gaps of one length
        shapes = [
            (len(blank.prefix), blank.free) if context.causal else (blank.length, blank.free) for blank in self.blanks
        ]
        self._groups = grouped(shapes, context.group_size, alike=True)
        self.settings: dict[str, Any] = {} if context.causal else {"sampler": asdict(self.sampler)}

    @property
    def num_groups(self) -> int:
        return len(self._groups)

    def _read(self, row: Row, number: int) -> Blank | None:
        try:
            return self.task.read(row, self.context)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise DataError(
                f"data.{self.task.name}, row {number}: not in the format of {self.task.source.hub} "
                f"({type(error).__name__}: {error})."
            ) from None

    def run(self, group: int) -> dict[str, Any]:
        numbers = self._groups[group]
        texts = self._continue(numbers) if self.context.causal else self._fill(numbers)
        return {"items": [self._record(number, *text) for number, text in zip(numbers, texts, strict=True)]}

    def _record(self, number: int, prediction: str, calls: int) -> dict[str, Any]:
        blank = self.blanks[number]
        record = {"item": number, "pred": prediction, "label": blank.references[0], **blank.fields}
        return record | {"metrics": self.task.grade(prediction, blank), "tokens": blank.free, "calls": calls}

    def _fill(self, numbers: Sequence[int]) -> list[tuple[str, int]]:
        context, blanks = self.context, [self.blanks[number] for number in numbers]
        mask = context.model.mask_id
        x_BL = row_tensor([b.prefix + [mask] * b.free + b.suffix for b in blanks], context.model.device)
        position_L = torch.arange(x_BL.shape[1])
        start_B = torch.tensor([len(blank.prefix) for blank in blanks])[:, None]
        free_B = torch.tensor([blank.free for blank in blanks])[:, None]
        given_BL = ~((position_L >= start_B) & (position_L < start_B + free_B))
        options = {name: getattr(self.sampler, name) for name in ("order", "steps", "block_length", "draw")}
        result = fill(
            context.model,
            x_BL,
            given_BL.to(x_BL.device),
            seed=context.seed,
            rows=numbers,
            max_rows=context.batch_size,
            **options,
        )
        found = []
        for blank, tokens_L, calls in zip(blanks, result.tokens_BL.tolist(), result.calls_B.tolist(), strict=True):
            found.append((self._text(tokens_L[len(blank.prefix) : len(blank.prefix) + blank.free]), int(calls)))
        return found

    def _continue(self, numbers: Sequence[int]) -> list[tuple[str, int]]:
        context, blanks = self.context, [self.blanks[number] for number in numbers]
        found = []
        for first in range(0, len(blanks), context.batch_size):
            part = blanks[first : first + context.batch_size]
            stop_id = context.tokenizer.eos_id if self.task.stops else None
            new = context.continue_causally([blank.prefix for blank in part], part[0].free, stop_id=stop_id)
            found += [(self._text(row), part[0].free) for row in new]
        return found

    def _text(self, ids: list[int]) -> str:
        if self.task.stops:
            ends = {self.context.tokenizer.eos_id, self.context.special.eos_id, self.context.special.pad_id}
            stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
            ids = ids[:stop]
        return self.context.decode(ids)

    def summary(self, records: Sequence[Mapping[str, Any]]) -> Outcome:
        items = by_item(records)
        names = list(items[0]["metrics"])
        metrics = [mean_metric(name, [item["metrics"][name] for item in items]) for name in names]
        facts = {
            "items": len(items),
            "skipped": self.skipped,
            "tokens": sum(item["tokens"] for item in items),
            "network_rows": sum(item["calls"] for item in items),
        }
        return Outcome(metrics, items, facts, list(self.task.notes))
