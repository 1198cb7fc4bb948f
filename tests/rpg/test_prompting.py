"""Sentences become class vectors: by a table of words, by the answers of a chat model, by a model's likelihoods."""

from pathlib import Path

import pytest
import torch

from common.errors import CheckpointError, ConfigError
from rpg.prompt_rules import CIFAR10, DIGITS
from rpg.prompting import (
    HuggingFaceChat,
    build_chat,
    class_names,
    description_of,
    prompt_vector,
    read_answer,
)

LIVING = ("bird", "cat", "deer", "dog", "frog", "horse")


def chosen(sentence: str, names=CIFAR10, chat=None, **options) -> tuple[str, ...]:
    vector = prompt_vector(sentence, names, chat, **options)
    assert len(vector) == len(names)
    return tuple(name for name, bit in zip(names, vector, strict=True) if bit)


@pytest.mark.parametrize(
    "sentence, expected",
    [
        ("select all living things", LIVING),
        ("Select all the animals!", LIVING),
        ("find everything that can fly", ("airplane", "bird")),
        ("find flying animals", ("bird",)),
        ("classify all vehicles except trucks", ("airplane", "automobile", "ship")),
        ("non-living things", ("airplane", "automobile", "ship", "truck")),
        ("cats, dogs and planes", ("airplane", "cat", "dog")),
        ("all but birds", tuple(name for name in CIFAR10 if name != "bird")),
        ("select all land vehicles", ("automobile", "truck")),
    ],
)
def test_a_table_of_words_understands_cifar10(sentence: str, expected: tuple[str, ...]):
    assert chosen(sentence) == expected


@pytest.mark.parametrize(
    "sentence, expected",
    [
        ("select all even digits", "02468"),
        ("find numbers greater than 6", "789"),
        ("find odd digits larger than 4", "579"),
        ("the odd ones", "13579"),
        ("all numbers between 3 and five", "345"),
        ("zero or a prime", "02357"),
        ("select 1, 2 and 7", "127"),
    ],
)
def test_a_table_of_words_understands_digits(sentence: str, expected: str):
    assert chosen(sentence, DIGITS) == tuple(DIGITS[int(digit)] for digit in expected)


def test_other_classes_are_found_by_their_names():
    assert chosen("find apples and pears", ("apple", "pear", "plum")) == ("apple", "pear")


def test_a_sentence_without_a_known_word_is_an_error_that_lists_known_ones():
    with pytest.raises(ConfigError, match="airplane, automobile.*vehicle"):
        prompt_vector("select all gizmos", CIFAR10, None)
    with pytest.raises(ConfigError, match="empty"):
        prompt_vector("  ", CIFAR10, None)


def test_the_description_follows_the_last_word_about_selecting():
    assert description_of("Please select all living things") == "living things"
    assert description_of("which can fly") == "which can fly"
    assert description_of("find them all") == "find them all"
    # the released rule reads "small" as a word about selecting
    assert description_of("find small animals") == "small animals"
    assert description_of("find small animals", whole_words=False) == "animals"


@pytest.mark.parametrize(
    "answer, by_words, by_letters",
    [
        ("YES", 1, 1),
        ("No.", 0, 0),
        ("Yes, nothing else does.", 1, 0),
        ("YES. I know that a cat lives.", 1, 0),
        ("No, although one could say yes", 0, 0),
        ("<think>no, wait</think> YES", 1, 0),
        ("certainly", 1, 1),
    ],
)
def test_an_answer_is_read_by_words_or_as_the_reference_by_letters(answer: str, by_words: int, by_letters: int):
    assert read_answer(answer) == by_words
    assert read_answer(answer, reading="letters") == by_letters


def test_a_chat_model_is_asked_once_per_class():
    questions = []

    class Scripted:
        def answer(self, system: str, question: str) -> str:
            questions.append(question)
            return "YES" if any(f"Class name: {name}\n" in question for name in LIVING) else "NO"

    assert chosen("select all living things", chat=Scripted()) == LIVING
    assert len(questions) == 10
    assert all("Description: living things" in question for question in questions)


def test_names_of_classes_come_from_a_set_a_file_or_a_list(tmp_path: Path):
    file = tmp_path / "names.txt"
    file.write_text("apple\npear\n\n")
    assert class_names(str(file)) == ("apple", "pear")
    assert class_names("cifar10") == CIFAR10
    assert class_names([1, 2]) == ("1", "2")
    with pytest.raises(ConfigError, match="classes=fruit"):
        class_names("fruit")
    with pytest.raises(ConfigError, match="different"):
        class_names(["a", "a"])


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA of width 16 over whole words, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "yes", "YES", "Yes", "no", "NO", "No", "system", "user", "assistant", "cat"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    folder = tmp_path_factory.mktemp("chat")
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_chat_model_of_transformers_answers_without_touching_the_global_generator(chat_folder: Path):
    state = torch.get_rng_state()
    written = build_chat(str(chat_folder), max_new_tokens=4)
    assert isinstance(written, HuggingFaceChat)
    assert written.answer("system", "cat") == written.answer("system", "cat")
    drawn = build_chat(str(chat_folder), max_new_tokens=4, sample=True, seed=1)
    assert drawn.answer("system", "cat") == drawn.answer("system", "cat")
    likely = build_chat(str(chat_folder), decision="likelihood")
    assert likely.answer("system", "cat") in ("YES", "NO")
    assert torch.equal(torch.get_rng_state(), state)


def test_likelihood_takes_the_more_probable_word(chat_folder: Path):
    chat = build_chat(str(chat_folder), decision="likelihood")
    yes, no = 4, 7
    with torch.no_grad():
        chat.model.lm_head.weight.zero_()
        direction = chat.model.model(input_ids=torch.tensor([chat._encode("a", "cat")["input_ids"][0].tolist()]))
        last = direction.last_hidden_state[0, -1]
        chat.model.lm_head.weight[yes] = last
    assert chat.answer("a", "cat") == "YES"
    with torch.no_grad():
        chat.model.lm_head.weight[no] = 2 * last
    assert chat.answer("a", "cat") == "NO"


def test_a_chat_model_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="chat_model=.*missing"):
        build_chat(str(tmp_path / "missing"))
    assert build_chat("rules") is None
