"""The released samplers: T calls or only those that matter, the same tokens; given tokens; rows; bad options."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from diffullama.reference_samplers import sample
from tests.diffullama.tiny_models import MASK, VOCAB, rows, tiny_lm

LENGTH = 12
MODELS = {shift: tiny_lm(shift=shift) for shift in (True, False)}


def canvas(seed: int = 0, size: int = 3, known: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Scattered given tokens, position 0 among them."""
    draw = torch.Generator().manual_seed(seed)
    src_mask = (torch.rand(size, LENGTH, generator=draw) < known).long()
    src_mask[:, 0] = 1
    return rows(size, LENGTH, seed=seed), src_mask


@given(
    seed=st.integers(0, 1000),
    steps=st.sampled_from([1, 2, 5, 12, 40]),
    order=st.sampled_from(["random", "confidence"]),
    draw=st.sampled_from(["sample", "greedy"]),
    shift=st.booleans(),
)
def test_skipping_calls_changes_no_token(seed: int, steps: int, order: str, draw: str, shift: bool):
    x, src_mask = canvas(seed)
    options = {"steps": steps, "order": order, "draw": draw, "shift": shift, "seed": seed, "top_p": 0.9, "temp": 0.8}
    every = sample(MODELS[shift], x, src_mask, cache=False, **options)
    fewer = sample(MODELS[shift], x, src_mask, cache=True, **options)
    assert torch.equal(every.tokens, fewer.tokens)
    assert torch.equal(every.model_inputs, fewer.model_inputs)
    assert every.n_calls == steps
    assert (every.calls_B == steps).all()
    states = fewer.model_inputs
    commits = [bool((a != b).any()) for a, b in zip(states, [*states[1:], torch.full_like(x, -1)])]
    assert fewer.n_calls <= sum(commits) + 1
    given_BL = src_mask.bool()[:, int(shift) :]
    assert torch.equal(fewer.tokens[given_BL], x[:, int(shift) :][given_BL])
    assert ((states == x) | (states == MASK) | ~src_mask.bool()).all()


def test_unpacks_as_tokens_inputs_and_calls():
    x, src_mask = canvas()
    tokens, model_inputs, n_calls = sample(MODELS[True], x, src_mask, 4, "random", "sample", 1.0, None, True)
    assert tokens.shape == (3, LENGTH - 1)
    assert model_inputs.shape == (4, 3, LENGTH)
    assert n_calls <= 4
    assert sample(MODELS[True], x, src_mask, 4, trace=False).model_inputs is None


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_a_row_depends_on_its_own_noise_alone(order: str):
    x, src_mask = canvas(4)
    options = {"steps": 7, "order": order, "seed": 5}
    together = sample(MODELS[True], x, src_mask, **options)
    alone = sample(MODELS[True], x[1:2], src_mask[1:2], rows=[1], **options)
    assert torch.equal(together.tokens[1], alone.tokens[0])
    assert not torch.equal(together.tokens, sample(MODELS[True], x, src_mask, **{**options, "seed": 6}).tokens)


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_given_everywhere_returns_the_input_without_a_call(order: str):
    x, _ = canvas()
    result = sample(MODELS[False], x, torch.ones_like(x), 5, order, shift=False)
    assert torch.equal(result.tokens, x)
    assert result.n_calls == 0


def test_a_free_first_position_of_a_shifted_model_takes_what_x_holds():
    x = torch.full((2, LENGTH), 7)
    result = sample(MODELS[True], x, torch.zeros_like(x), 6, "random", seed=1)
    states = result.model_inputs[:, :, 0]
    assert set(states.flatten().tolist()) <= {7, MASK}
    assert (sample(MODELS[True], x, torch.zeros_like(x), 1, "confidence").model_inputs == MASK).all()


def test_the_mask_can_be_forbidden():
    x = torch.zeros(40, LENGTH, dtype=torch.int64)
    src_mask = torch.zeros_like(x)
    src_mask[:, 0] = 1
    free = sample(MODELS[True], x, src_mask, 3, "random", temp=5.0)
    without = sample(MODELS[True], x, src_mask, 3, "random", temp=5.0, forbid=[MASK, 1])
    assert (free.tokens == MASK).any()  # the released code's behaviour
    assert not torch.isin(without.tokens, torch.tensor([MASK, 1])).any()


def test_forbidding_with_the_head_at_few_positions_equals_the_full_head():
    class Plain(torch.nn.Module):
        """The same network without ``denoise``."""

        mask_id = MASK

        def forward(self, tokens):
            return MODELS[True](tokens)

    x, src_mask = canvas(3)
    options = {"steps": 6, "order": "confidence", "forbid": [MASK], "seed": 2}
    assert torch.equal(
        sample(MODELS[True], x, src_mask, **options).tokens, sample(Plain(), x, src_mask, **options).tokens
    )


def test_score_noise_changes_the_order_only_where_it_is_asked_for():
    x, src_mask = canvas(6, known=0.0)
    plain = sample(MODELS[True], x, src_mask, 8, draw="greedy")
    noisy = sample(MODELS[True], x, src_mask, 8, draw="greedy", score_noise=3.0)
    assert not torch.equal(plain.model_inputs, noisy.model_inputs)
    u = torch.rand(7, 3, LENGTH, generator=torch.Generator().manual_seed(0))
    given_u = [sample(MODELS[True], x, src_mask, 8, draw="greedy", score_noise=3.0, u=u).tokens for _ in range(2)]
    assert torch.equal(*given_u)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps=0"),
        ({"order": "sideways"}, "choose one of random, confidence"),
        ({"draw": "beam"}, "choose one of sample, greedy"),
        ({"temp": -1.0}, "temp=-1"),
        ({"top_p": 0.0}, r"\(0, 1\]"),
        ({"top_k": 0}, "top_k=0"),
        ({"shift": False}, "adapted with shift=True"),
        ({"order": "random", "score_noise": 1.0}, "order=confidence"),
        ({"src_mask": torch.zeros(1, 4)}, "both must be"),
    ],
)
def test_bad_options_are_named(options: dict, message: str):
    x, src_mask = canvas()
    with pytest.raises(ConfigError, match=message):
        sample(MODELS[True], x, options.pop("src_mask", src_mask), **options)


def test_vocabulary_of_the_tiny_model_is_what_the_tests_assume():
    assert MODELS[True].vocab_size == VOCAB == MASK + 1
