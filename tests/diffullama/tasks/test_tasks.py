"""Each task's protocol on its example rows: what is visible, what is masked, what is graded."""

from dataclasses import replace

import pytest
import torch

from common.diffusion.categorical import TokenDraw
from common.errors import ConfigError, DataError
from diffullama.metrics import normalize_answer
from diffullama.sandbox import Limits
from diffullama.scoring import ScoringRule, causal_scores, choice_scores
from diffullama.tasks.choice import CHOICE_TASKS, ChoiceEvaluation, clean
from diffullama.tasks.context import by_item, grouped
from diffullama.tasks.corpus import BoundEvaluation, BoundOptions, SpanEvaluation
from diffullama.tasks.programs import ProgramEvaluation
from diffullama.tasks.text import TEXT_TASKS, FillOptions, TextEvaluation, story_sentences
from tests.diffullama.tasks.examples import ROWS, STORIES, memorising_denoiser, tiny_context

CONTEXT = tiny_context(group_size=2)
CAUSAL = replace(CONTEXT, causal=True)


def rows_of(name: str) -> list[dict]:
    """Example rows with the fields that a task's reader expects."""
    columns = (CHOICE_TASKS.get(name) or TEXT_TASKS[name]).source.columns
    return [row | {ours: row[next(n for n in names if n in row)] for ours, names in columns.items()}
            for row in ROWS[name]]  # fmt: skip


def run_all(evaluation) -> tuple[list, object]:
    records = [evaluation.run(group) for group in range(evaluation.num_groups)]
    return records, evaluation.summary(records)


# ---------------------------------------------------------------- multiple choice


def test_questions_are_worded_as_released():
    questions = {name: task.read(rows_of(name)[0]) for name, task in CHOICE_TASKS.items()}
    swag = questions["hellaswag"]
    assert swag.prefix == "Baking: A woman mixes dough in a bowl. She"
    assert swag.continuations[0] == ["puts it in the oven. Done"] and swag.label == 0
    assert clean(" a [title] b  c [step]") == "a. b c "
    wino = questions["winogrande"]
    assert wino.prefix == "The trophy did not fit into the bag because the "
    assert wino.continuations == [["trophy", " was too big."], ["bag", " was too big."]] and wino.label == 0
    assert questions["piqa"].prefix == "Question: Open a jar\nAnswer: "
    assert questions["piqa"].continuations == [[" twist the lid"], [" twist the jar's glass"]]
    assert questions["siqa"].prefix == "Question: Kim helped Lee move. How would Lee feel?\nAnswer: "
    assert questions["siqa"].label == 0


@pytest.mark.parametrize("name", CHOICE_TASKS)
@pytest.mark.parametrize("causal", [False, True])
def test_choices_follow_the_scores_of_single_items(name, causal):
    task, rule = CHOICE_TASKS[name], ScoringRule(levels=8)
    evaluation = ChoiceEvaluation(task, rows_of(name), CAUSAL if causal else CONTEXT, rule)
    records, outcome = run_all(evaluation)
    assert [item["item"] for item in outcome.items] == list(range(len(ROWS[name])))
    for item, encoded in zip(outcome.items, evaluation.items, strict=True):
        if causal:
            expected = (-causal_scores(CONTEXT.model, encoded.prefix, encoded.continuations, task.reduce)).tolist()
            assert item["scores"] == pytest.approx(expected, rel=1e-5)
        assert item["choice"] == min(range(len(item["scores"])), key=lambda c: item["scores"][c])
    share = 100 * sum(item["correct"] for item in outcome.items) / len(outcome.items)
    assert outcome.metrics[0].name == "accuracy" and outcome.metrics[0].value == pytest.approx(share)
    assert [metric.name for metric in outcome.metrics[1:]] == ([] if causal else ["undecided"])


def test_the_reference_estimator_is_the_golden_score():
    rule = ScoringRule(estimator="reference", levels=5, by_id=True)
    evaluation = ChoiceEvaluation(CHOICE_TASKS["piqa"], rows_of("piqa"), CONTEXT, rule)
    _, outcome = run_all(evaluation)
    encoded = evaluation.items[0]
    alone = choice_scores(CONTEXT.model, encoded.prefix, encoded.continuations, 5)
    assert outcome.items[0]["scores"] == pytest.approx(alone.tolist(), rel=1e-5)


def test_an_empty_prefix_gets_a_beginning_and_a_long_one_loses_its_start():
    evaluation = ChoiceEvaluation(CHOICE_TASKS["winogrande"], rows_of("winogrande"), CONTEXT, ScoringRule(levels=2))
    assert evaluation.items[1].prefix == [0]  # the sentence begins with the gap
    short = replace(CONTEXT, max_length=30)
    for item in ChoiceEvaluation(CHOICE_TASKS["piqa"], rows_of("piqa"), short, ScoringRule(levels=2)).items:
        assert len(item.prefix) + max(map(len, item.continuations)) <= 30
    with pytest.raises(DataError, match="leave no room for a prefix in max_length=5"):
        ChoiceEvaluation(CHOICE_TASKS["piqa"], rows_of("piqa"), replace(CONTEXT, max_length=5), ScoringRule())


def test_rows_without_labels_or_gaps_are_named():
    for name, change, message in [
        ("hellaswag", {"label": ""}, "data.hellaswag, row 0"),
        ("siqa", {"label": "4"}, "label 3 is none of 3 answers"),
        ("winogrande", {"sentence": "no gap"}, "has no gap"),
    ]:
        with pytest.raises(DataError, match=message):
            ChoiceEvaluation(CHOICE_TASKS[name], [rows_of(name)[0] | change], CONTEXT, ScoringRule())


# ---------------------------------------------------------------- text


def blanks(name: str, context=CONTEXT):
    return TextEvaluation(TEXT_TASKS[name], rows_of(name), context, FillOptions()).blanks


def test_gaps_have_the_references_length_and_surroundings():
    encode, decode = CONTEXT.tokenizer.encode, CONTEXT.decode
    word = blanks("lambada")[1]
    assert decode(word.prefix) == "she read the book that he" and word.references == ["wrote"]
    assert word.free == len(encode("she read the book that he wrote")) - len(encode("she read the book that he"))
    trivia = blanks("triviaqa")[0]
    assert decode(trivia.prefix) == "Question: Which city is the capital of France?\nAnswer: "
    assert trivia.free == max(len(encode("Paris")), len(encode("City of Paris")))
    assert decode(blanks("squad")[0].prefix).startswith("The sky is blue.\nQuestion: What colour is the sky?\n")
    story = blanks("rocstories")[0]
    assert decode(story.prefix) == " ".join(STORIES[0][:2]) and decode(story.suffix) == " " + " ".join(STORIES[0][3:])
    assert story.free == len(encode(" " + STORIES[0][2])) and story.references == [STORIES[0][2]]
    arithmetic = blanks("gsm8k")[0]
    assert arithmetic.length == 192 and arithmetic.prefix == [0, *encode("Tom has 2 and gets 3. How many?")]
    line = blanks("humaneval_infill")[0]
    assert decode(line.suffix) == "    return total\n" and line.free == len(encode("    total = a + b\n"))


def test_stories_are_read_from_all_published_formats():
    expected = dict(zip(("first", "second", "third", "fourth", "fifth"), STORIES[0], strict=True))
    csv = {f"InputSentence{n + 1}": STORIES[0][n] for n in range(4)}
    csv |= {"RandomFifthSentenceQuiz1": STORIES[0][4], "RandomFifthSentenceQuiz2": "No.", "AnswerRightEnding": "1"}
    assert story_sentences(ROWS["rocstories"][0]) == story_sentences(csv) == expected
    assert story_sentences({f"sentence{n + 1}": text for n, text in enumerate(STORIES[0])}) == expected
    with pytest.raises(DataError, match="its columns are text"):
        story_sentences({"text": "x"})


@pytest.mark.parametrize("name", [name for name in TEXT_TASKS if name != "humaneval_infill"])
def test_a_model_that_knows_the_answer_gets_full_marks(name):
    """The canvas holds the right ids at the right positions, and the grade reads exactly the gap."""
    context = tiny_context(model=tiny_context().model, tokenizer=CONTEXT.tokenizer, group_size=1)
    row = rows_of(name)[:1]
    evaluation = TextEvaluation(TEXT_TASKS[name], row, context, FillOptions())
    blank = evaluation.blanks[0]
    answer = blank.references[-1 if name in ("triviaqa", "squad") else 0]
    if name in ("lambada", "rocstories"):
        answer = " " + answer
    ids = context.tokenizer.encode(answer)
    gap = ids + [0] * (blank.free - len(ids))
    memorising_denoiser(context.model, torch.tensor(blank.prefix + gap + blank.suffix))
    _, outcome = run_all(evaluation)
    if name not in ("gsm8k",):
        assert len(ids) == blank.free or name in ("triviaqa", "squad")
    assert all(metric.value == pytest.approx(100) for metric in outcome.metrics), outcome.items
    assert outcome.items[0]["calls"] <= (64 if name == "gsm8k" else blank.free)


@pytest.mark.parametrize("name", [name for name in TEXT_TASKS if name != "humaneval_infill"])
@pytest.mark.parametrize("causal", [False, True])
def test_answers_do_not_depend_on_the_groups(name, causal):
    items = {}
    for size in (1, 8):
        context = replace(CAUSAL if causal else CONTEXT, group_size=size, batch_size=size)
        _, outcome = run_all(TextEvaluation(TEXT_TASKS[name], rows_of(name), context, FillOptions()))
        items[size] = outcome.items
        assert all(metric.value >= 0 for metric in outcome.metrics)
    assert items[1] == items[8]


def test_fill_options_replace_the_tasks_own():
    evaluation = TextEvaluation(TEXT_TASKS["gsm8k"], rows_of("gsm8k"), CONTEXT, FillOptions(steps=3, temperature=0.5))
    assert evaluation.sampler.steps == 3 and evaluation.sampler.draw == TokenDraw(temperature=0.5)
    assert FillOptions(top_p=0.9, temperature=1).draw(TokenDraw()).strategy == "top_p"
    assert TextEvaluation(TEXT_TASKS["gsm8k"], rows_of("gsm8k"), CONTEXT, FillOptions()).sampler.draw.is_greedy
    _, outcome = run_all(evaluation)
    assert outcome.items[0]["calls"] <= 3
    with pytest.raises(ConfigError, match="order='middle'"):
        FillOptions(order="middle")


def test_rows_in_another_format_are_named():
    with pytest.raises(DataError, match=r"data.triviaqa, row 0: not in the format of mandarjoshi/trivia_qa"):
        TextEvaluation(TEXT_TASKS["triviaqa"], [{"question": "x", "answer": "y"}], CONTEXT, FillOptions())


# ---------------------------------------------------------------- programs


def test_programs_pass_with_the_right_line_only_and_long_ones_are_left_out():
    limits = Limits(seconds=2, memory_mb=256)
    long = rows_of("humaneval_infill")[0] | {"suffix": "# long\n" * 400}
    context = tiny_context(model=tiny_context().model, tokenizer=CONTEXT.tokenizer)
    evaluation = ProgramEvaluation([*rows_of("humaneval_infill"), long], context, FillOptions(), limits)
    assert evaluation.skipped == 1
    blank = evaluation.blanks[0]
    for solution, passed in [("    total = a + b\n", 100.0), ("    total = a - b\n", 0.0)]:
        ids = context.tokenizer.encode(solution)
        gap = (ids + [0] * blank.free)[: blank.free]
        memorising_denoiser(context.model, torch.tensor(blank.prefix + gap + blank.suffix))
        _, outcome = run_all(evaluation)
        values = {metric.name: metric.value for metric in outcome.metrics}
        assert values["pass@1"] == passed and values["exact_match"] == passed
    (sample,) = outcome.exports["samples"]
    assert sample == {"task_id": "SingleLineInfilling/HumanEval/0/L0", "completion": outcome.items[0]["pred"]}


def test_nothing_is_executed_unless_asked_for(monkeypatch):
    monkeypatch.setattr("diffullama.tasks.programs.run_program", None)
    _, outcome = run_all(ProgramEvaluation(rows_of("humaneval_infill"), CONTEXT, FillOptions(), None))
    assert [metric.name for metric in outcome.metrics] == ["exact_match"]
    assert any("no code was executed" in note for note in outcome.notes)


# ---------------------------------------------------------------- text likelihood


@pytest.mark.parametrize("estimator", ["count", "time"])
def test_bound_of_a_text_counts_every_token_and_byte(estimator, tmp_path):
    (tmp_path / "text.txt").write_text("the door is open and the book is read. " * 40)
    options = BoundOptions(text=str(tmp_path / "text.txt"), length=32, estimator=estimator, draws=8)
    evaluation = BoundEvaluation(CONTEXT, options, 20)
    _, outcome = run_all(evaluation)
    values = {metric.name: metric for metric in outcome.metrics}
    assert evaluation.blocks.x_NL[:, 0].eq(0).all() and evaluation.blocks.given == 1
    assert outcome.facts["tokens"] == 31 * outcome.facts["blocks"] and len(outcome.items) == outcome.facts["blocks"]
    per_byte = values["bits_per_byte"].value * evaluation.blocks.bytes_per_token * 0.6931471805599453
    assert per_byte == pytest.approx(values["nats_per_token"].value)
    assert values["nats_per_token"].standard_error > 0
    assert 1 < evaluation.blocks.bytes_per_token < 5


def test_causal_likelihood_is_exact_and_the_suffix_needs_diffusion():
    options = BoundOptions(length=24)
    _, outcome = run_all(BoundEvaluation(CAUSAL, options, 4))
    values = {metric.name: metric for metric in outcome.metrics}
    assert values["nats_per_token"].standard_error == 0.0 and values["nats_per_token_over_blocks"].standard_error > 0
    with pytest.raises(ConfigError, match="needs mode=diffusion"):
        SpanEvaluation(CAUSAL, options, 4)
    _, outcome = run_all(SpanEvaluation(CONTEXT, options, 20))
    gain = {metric.name: metric for metric in outcome.metrics}["gain_of_suffix"]
    differences = [item["without_suffix"] - item["with_suffix"] for item in outcome.items]
    assert gain.value == pytest.approx(sum(differences) / 20)
    with pytest.raises(ConfigError, match="nelbo.length=500 exceeds max_length=192"):
        BoundEvaluation(CONTEXT, BoundOptions(length=500), 4)


def test_groups_hold_every_item_once_and_only_equal_keys_if_asked():
    keys = [3, 1, 3, 2, 1, 3]
    assert grouped(keys, 2) == [[1, 4], [3, 0], [2, 5]]
    assert grouped(keys, 2, alike=True) == [[1, 4], [3], [0, 2], [5]]
    assert by_item([{"items": [{"item": 1}]}, {"items": [{"item": 0}]}]) == [{"item": 0}, {"item": 1}]
    assert normalize_answer("The a") == ""
