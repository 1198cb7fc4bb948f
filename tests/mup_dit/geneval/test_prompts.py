"""Lists of prompts: checks of what is read, and lists of the published one's make."""

import json
from collections import Counter

import pytest

from common.errors import ConfigError, DataError
from mup_dit.geneval.prompts import CLASSES, TASK_SIZES, check_metadata, make_prompts, published_sizes, read_metadata


def test_a_list_of_our_own_has_the_published_tasks_and_passes_its_checks():
    prompts = make_prompts()
    assert len(prompts) == 553 and published_sizes(prompts)
    assert Counter(entry["tag"] for entry in prompts) == Counter(TASK_SIZES)
    for entry in prompts:
        check_metadata(entry, "made")
    assert make_prompts() == prompts != make_prompts(1)
    assert len({entry["prompt"] for entry in prompts}) > 540
    assert len(CLASSES) == len(set(CLASSES)) == 80


def test_wording_of_prompts():
    by_tag = {entry["tag"]: entry for entry in make_prompts()}
    counting = by_tag["counting"]
    assert counting["exclude"][0]["count"] == counting["include"][0]["count"] + 1
    singles = [entry["prompt"] for entry in make_prompts() if entry["tag"] == "single_object"]
    assert "a photo of an elephant" in singles and "a photo of a bus" in singles


def test_a_line_that_cannot_be_judged_is_named(tmp_path):
    path = tmp_path / "metadata.jsonl"
    good = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}
    path.write_text(json.dumps(good) + "\n\n{broken\n")
    with pytest.raises(DataError, match="line 3"):
        read_metadata(path)
    path.write_text(json.dumps(good))
    assert read_metadata(path) == [good]
    path.write_text("")
    with pytest.raises(DataError, match="no prompts"):
        read_metadata(path)
    with pytest.raises(DataError, match="unicorn"):
        check_metadata({**good, "include": [{"class": "unicorn", "count": 1}]}, "here")
    with pytest.raises(DataError, match="count 0"):
        check_metadata({**good, "include": [{"class": "cat", "count": 0}]}, "here")
    with pytest.raises(ConfigError, match="color='mauve'"):
        check_metadata({**good, "include": [{"class": "cat", "count": 1, "color": "mauve"}]}, "here")
    with pytest.raises(DataError, match="earlier"):
        check_metadata({**good, "include": [{"class": "cat", "count": 1, "position": ["above", 0]}]}, "here")
    with pytest.raises(DataError, match="no prompt"):
        check_metadata({"tag": "colors"}, "here")
