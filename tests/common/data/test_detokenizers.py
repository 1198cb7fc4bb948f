"""Detokenizers against the frozen pairs of the reference, and the choice by name."""

import pytest

from common.data.detokenizers import DETOKENIZERS, find_detokenizer
from common.errors import ConfigError
from common.testing.golden import load_cases


@pytest.mark.parametrize("name", DETOKENIZERS)
def test_detokenizers_equal_the_reference_on_the_golden_pairs(golden_dir, name: str):
    pairs = load_cases("radd", golden_dir)["detokenizers"].raw["pairs"][name]
    for text, expected in pairs:
        assert DETOKENIZERS[name](text) == expected


def test_every_golden_detokenizer_exists(golden_dir):
    assert set(load_cases("radd", golden_dir)["detokenizers"].raw["pairs"]) == set(DETOKENIZERS)


@pytest.mark.parametrize("name", DETOKENIZERS)
def test_detokenizers_accept_empty_text_and_text_without_any_rule(name: str):
    assert DETOKENIZERS[name]("").strip() == ""
    assert DETOKENIZERS[name]("plain words").strip() == "plain words"


@pytest.mark.parametrize(
    "dataset, expected",
    [
        ("wikitext103", "wikitext"),
        ("wikitext2", "wikitext"),
        ("ptb", "ptb"),
        ("lm1b", "lm1b"),
        ("lambada", "lambada"),
        ("openwebtext", "none"),
        ("embedded", "none"),
    ],
)
def test_the_automatic_choice_goes_by_the_corpus(dataset: str, expected: str):
    name, function = find_detokenizer("auto", dataset)
    assert name == expected
    assert function is DETOKENIZERS.get(expected)


def test_a_named_detokenizer_overrules_the_corpus_and_an_unknown_one_is_refused():
    assert find_detokenizer("ptb", "openwebtext")[1] is DETOKENIZERS["ptb"]
    assert find_detokenizer(None, "ptb") == find_detokenizer("none", "ptb") == ("none", None)
    with pytest.raises(ConfigError, match="detokenizer='moses' must be auto, none or one of wikitext"):
        find_detokenizer("moses", "ptb")
