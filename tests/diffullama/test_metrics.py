"""Answer metrics beyond the golden case: edges, bounds, and agreement of means with items."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from diffullama.metrics import contains_answer, gsm_accuracy, gsm_answer, normalize_answer, rouge, rouge_each, token_f1


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    once = normalize_answer(text)
    assert normalize_answer(once) == once
    assert once == once.strip() and "  " not in once


@given(st.lists(st.sampled_from(["cat", "the", "Dog!", "7"]), max_size=6), st.lists(st.sampled_from("ab")))
def test_f1_is_symmetric_and_bounded(first, second):
    one, other = " ".join(first), " ".join([*second, *first[:1]])
    assert token_f1(one, other) == pytest.approx(token_f1(other, one))
    assert 0 <= token_f1(one, other) <= 1
    assert token_f1(one, one) == (1.0 if normalize_answer(one) else 0.0)


def test_f1_counts_repeated_words_once_each():
    assert token_f1("cat cat", "cat dog") == pytest.approx(0.5)
    assert token_f1("cat", []) == 0.0


def test_an_answer_that_normalises_to_nothing_is_contained_in_nothing():
    assert contains_answer("It was the Eiffel Tower.", ["eiffel tower", "x"])
    assert not contains_answer("anything", ["the", "!"])


def test_gsm_answer_is_what_follows_the_last_mark():
    assert gsm_answer("a #### 1 #### 2,000 ") == "2000"
    assert gsm_answer("12") == "12"
    with pytest.raises(DataError, match="1 predictions and 2 references"):
        gsm_accuracy(["1"], ["1", "2"])
    with pytest.raises(DataError, match="0 predictions"):
        gsm_accuracy([], [])


def test_rouge_of_known_pairs_and_its_mean():
    same = rouge_each("the cat sat", "the cat sat")
    assert same == pytest.approx({"rouge1": 100, "rouge2": 100, "rougeL": 100, "rouge": 100})
    other = rouge_each("cat the sat", "the cat sat")  # every word, no pair of words but a common order of two
    assert other["rouge1"] == pytest.approx(100) and other["rouge2"] == 0
    assert other["rougeL"] == pytest.approx(200 / 3)
    both = rouge(["the cat sat", "cat the sat"], ["the cat sat", "the cat sat"])
    assert both["rougeL"] == pytest.approx((same["rougeL"] + other["rougeL"]) / 2)
    assert rouge_each("", "the cat")["rouge"] == 0
