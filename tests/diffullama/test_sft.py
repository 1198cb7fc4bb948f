"""Fine-tuning examples: the layout, what is given, and what happens to texts that are too long."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from diffullama.sft import sft_example

BOS, SEP, EOS, PAD = 100, 101, 102, 103
SPECIAL = {"bos": BOS, "sep": SEP, "eos": EOS, "pad": PAD}
TOKENS = st.lists(st.integers(0, 99), max_size=30)


@given(prompt=TOKENS, answer=TOKENS, cutoff=st.integers(4, 40), parity=st.booleans())
def test_an_example_has_the_length_asked_for_and_gives_prompts_only(prompt, answer, cutoff, parity):
    ids, src_mask = sft_example(prompt, answer, **SPECIAL, cutoff=cutoff, parity=parity)
    assert len(ids) == len(src_mask) == cutoff
    assert ids[0] == BOS
    assert src_mask == sorted(src_mask, reverse=True)  # given tokens come first
    assert PAD not in ids[: sum(src_mask)]


@given(prompt=TOKENS, answer=TOKENS, cutoff=st.integers(40, 80), parity=st.booleans())
def test_short_texts_are_kept_whole(prompt, answer, cutoff, parity):
    if len(prompt) + len(answer) + 3 > cutoff:
        return
    ids, src_mask = sft_example(prompt, answer, **SPECIAL, cutoff=cutoff, parity=parity)
    given_tokens = [BOS, *prompt, SEP]
    assert ids[: len(given_tokens)] == given_tokens
    rest = [*answer, EOS]
    assert ids[len(given_tokens) :] == rest + [PAD] * (cutoff - len(given_tokens) - len(rest))
    assert src_mask == [1] * len(given_tokens) + [0] * (cutoff - len(given_tokens))


@given(prompt=TOKENS, answer=TOKENS, cutoff=st.integers(4, 30))
def test_ours_always_keeps_an_answer_its_end_and_a_share_of_the_prompt(prompt, answer, cutoff):
    ids, src_mask = sft_example(prompt, answer, **SPECIAL, cutoff=cutoff, parity=False)
    assert EOS in ids
    assert ids[sum(src_mask) - 1] == SEP
    kept_prompt, kept_answer = ids[1 : sum(src_mask) - 1], ids[sum(src_mask) : ids.index(EOS)]
    assert kept_prompt == prompt[len(prompt) - len(kept_prompt) :]
    assert kept_answer == answer[: len(kept_answer)]
    room = cutoff - 3
    assert len(kept_prompt) >= min(len(prompt), room // 4)
    assert len(kept_answer) >= min(len(answer), room - room // 4)


def test_the_reference_loses_the_answer_of_a_long_prompt_beside_a_long_answer():
    prompt, answer = list(range(20)), list(range(20, 40))
    ids, src_mask = sft_example(prompt, answer, **SPECIAL, cutoff=16)
    assert ids == [BOS, *prompt[:15]]
    assert src_mask == [1] * 16
    ids, src_mask = sft_example(prompt, answer, **SPECIAL, cutoff=16, parity=False)
    assert ids == [BOS, *prompt[-3:], SEP, *answer[:10], EOS]


def test_no_room_for_an_answer_is_refused():
    with pytest.raises(ConfigError, match=r"model.length=3 holds no prompt and answer; use at least 4"):
        sft_example([1], [2], **SPECIAL, cutoff=3)
