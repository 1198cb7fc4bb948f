"""Caption cleaning and flags inside prompts, beside the golden cases."""

import pytest

from common.errors import ConfigError
from mup_dit.aspect_ratios import ASPECT_RATIO_256_TEST
from mup_dit.captions import clean_caption, parse_prompt


@pytest.mark.parametrize("text", ["A photo of a cat!!", "see www.example.com <b>now</b>", "dog-and-cat_in_a_boat-x"])
def test_cleaning_what_is_clean_changes_nothing(text):
    cleaned = clean_caption(text)
    assert cleaned == clean_caption(cleaned) == cleaned.strip().lower()


def test_sizes_of_prompts_come_from_the_table_given():
    prompt = parse_prompt("a boat --ar 1:4", ASPECT_RATIO_256_TEST)
    assert (prompt.text, prompt.bucket, prompt.ratio) == ("a boat ", (128, 512), 0.25)
    assert parse_prompt("a boat --hw 64:32", ASPECT_RATIO_256_TEST).size == (64, 32)


def test_a_side_of_zero_is_refused():
    with pytest.raises(ConfigError, match="--ar 1:0"):
        parse_prompt("a boat --ar 1:0")
