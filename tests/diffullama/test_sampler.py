"""Samplers of adapted models: what is given stays, no mask, calls as promised, rows apart, laws, bad options."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.diffusion.categorical import TokenDraw, draw_tokens
from common.diffusion.nfe import reveal_distribution, update_rate
from common.diffusion.reveal import AFTER_STOP, GIVEN, event_states, reveal_steps, row_uniforms
from common.diffusion.schedules import LogLinear
from common.errors import ConfigError
from diffullama.prefix_cache import PrefixCachedDenoiser, block_causal_allowed
from diffullama.sampler import SamplerOptions, build_sampler, fill
from tests.diffullama.tiny_models import MASK, VOCAB, rows, tiny_lm

LENGTH, BLOCK = 20, 6
SHIFTED = tiny_lm()
MODELS = {
    "gpt2": SHIFTED,
    "gpt2, no shift": tiny_lm(shift=False),
    "llama": tiny_lm("llama"),
    "eager": tiny_lm("llama", shift=False, implementation="eager"),
}
OPTIONS = {
    "random": {"order": "random", "steps": 7},
    "random, more steps than positions": {"order": "random", "steps": 200},
    "random, fixed counts": {"order": "random", "steps": 7, "commit": "fixed"},
    "first hitting": {"order": "first_hitting", "draw": TokenDraw(strategy="top_k", para=3)},
    "confidence": {"steps": 5, "draw": TokenDraw(strategy="top_p", para=0.9, temperature=0.7)},
    "confidence, one by one": {"draw": TokenDraw(strategy="greedy")},
    "entropy": {"order": "entropy", "per_call": 4},
    "margin": {"order": "margin", "steps": 1},
    "threshold": {"threshold": 0.2},
    "entropy bound": {"order": "entropy", "entropy_bound": 1.5},
    "left to right": {"order": "left_to_right", "steps": 4},
    "noise": {"steps": 5, "noise": 2.0},
    "blocks": {"steps": 2, "block_length": BLOCK},
    "random blocks": {"order": "random", "steps": 3, "block_length": BLOCK},
    "guidance": {"steps": 5, "guidance": 1.5},
    "random, guidance": {"order": "random", "steps": 5, "guidance": 0.5},
}


def canvas(size: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Infilling: a prefix, a suffix and scattered tokens."""
    given_BL = torch.rand(size, LENGTH, generator=torch.Generator().manual_seed(seed)) < 0.2
    given_BL[:, :2] = given_BL[:, -1:] = True
    return rows(size, LENGTH, seed=seed), given_BL


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("model", MODELS)
def test_given_tokens_stay_masks_go_and_calls_are_as_promised(name: str, model: str):
    x_BL, given_BL = canvas()
    result = fill(MODELS[model], x_BL, given_BL, seed=1, forbid=[4], **OPTIONS[name])
    assert torch.equal(result.tokens_BL[given_BL], x_BL[given_BL])
    assert not torch.isin(result.tokens_BL[~given_BL], torch.tensor([MASK, 4])).any()
    assert torch.equal(result.revealed_BL == GIVEN, given_BL)
    sampler = build_sampler(MODELS[model], SamplerOptions(**OPTIONS[name]))
    for row in range(3):
        expected = sampler.expected_calls(~given_BL[row])
        calls = int(result.calls_B[row])
        if expected.is_bound or not expected.variance:
            assert calls <= expected.mean
            assert expected.is_bound or calls == expected.mean
        else:
            assert abs(calls - expected.mean) <= 5 * math.sqrt(expected.variance)


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_depend_on_seed_and_number_alone(name: str):
    x_BL, given_BL = canvas(5, seed=2)
    together = fill(SHIFTED, x_BL, given_BL, seed=3, **OPTIONS[name])
    in_turn = fill(SHIFTED, x_BL, given_BL, seed=3, max_rows=2, **OPTIONS[name])
    alone = fill(SHIFTED, x_BL[3:4], given_BL[3:4], seed=3, rows=[3], **OPTIONS[name])
    assert torch.equal(together.tokens_BL, in_turn.tokens_BL)
    assert torch.equal(together.tokens_BL[3], alone.tokens_BL[0])
    assert together.calls_B[3] == alone.calls_B[0]


@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_to_fill_costs_nothing(name: str):
    x_BL, _ = canvas()
    result = fill(SHIFTED, x_BL, torch.ones_like(x_BL), **OPTIONS[name])
    assert torch.equal(result.tokens_BL, x_BL)
    assert result.calls_B.tolist() == [0, 0, 0]
    assert result.launches == 0


@given(steps=st.sampled_from([1, 2, 5, 30]), seed=st.integers(0, 100))
def test_the_random_order_is_one_call_per_step_without_those_that_change_nothing(steps: int, seed: int):
    x_BL, given_BL = canvas(2, seed)
    result = fill(SHIFTED, x_BL, given_BL, order="random", steps=steps, seed=seed)
    tokens_BL = torch.where(given_BL, x_BL, MASK)
    level_BL, uniform_BL = row_uniforms(seed, range(2), LENGTH)
    rate_S = update_rate(LogLinear(), "tweedie", steps, 0.0)
    assert torch.allclose(rate_S, 1 / (steps - torch.arange(steps, dtype=torch.float64)))
    step_BL = reveal_steps(level_BL, reveal_distribution(rate_S))
    for step in range(steps):
        commits_BL = ~given_BL & (step_BL == step)
        if commits_BL.any():
            log_probs_PV = SHIFTED.denoise(tokens_BL, commits_BL)
            tokens_BL[commits_BL] = draw_tokens(log_probs_PV, uniform_BL[commits_BL])
    assert torch.equal(result.tokens_BL, tokens_BL)
    distinct = [len(set(step_BL[row][~given_BL[row]].tolist())) for row in range(2)]
    assert result.calls_B.tolist() == distinct


@pytest.mark.parametrize("steps", [1, 3, 4, 17, 100])
def test_fixed_counts_fill_equally_many_positions_in_every_step(steps: int):
    x_BL, given_BL = canvas(1, seed=8)
    free = int((~given_BL).sum())
    result = fill(SHIFTED, x_BL, given_BL, steps=steps)
    counts = torch.bincount(result.revealed_BL[result.revealed_BL >= 0])
    assert len(counts) == min(steps, free)
    assert set(counts.tolist()) <= {free // len(counts), -(-free // len(counts))}


def test_a_given_token_may_be_the_mask():
    x_BL, given_BL = canvas()
    x_BL[:, 1] = MASK
    for options in OPTIONS.values():
        result = fill(SHIFTED, x_BL, given_BL, **options)
        assert (result.tokens_BL[:, 1] == MASK).all()
        assert torch.equal(result.tokens_BL[given_BL], x_BL[given_BL])


# ---------------------------------------------------------------------------------------------------- the end of a text


@pytest.mark.parametrize(
    "options",
    [
        {"order": "left_to_right"},
        {"order": "left_to_right", "noise": 1e-9},
        {"order": "random", "steps": 30},
        {"order": "confidence", "steps": 15},
        {"order": "confidence", "steps": 3, "block_length": BLOCK},
        {"order": "random", "steps": 3, "block_length": BLOCK},
    ],
)
def test_texts_end_at_the_first_stop_token(options: dict):
    stops, pad = list(range(3, 12)), 0
    x_BL = torch.full((12, LENGTH), 5)  # a stop token in the prompt does not count
    given_BL = torch.zeros_like(x_BL, dtype=torch.bool)
    given_BL[:, :2] = True
    whole = fill(SHIFTED, x_BL, given_BL, seed=4, **options)
    short = fill(SHIFTED, x_BL, given_BL, seed=4, stop=stops, pad=pad, **options)
    assert not (short.tokens_BL == MASK).any()
    assert short.calls_B.sum() < whole.calls_B.sum()
    ended = 0
    for row in range(12):
        tokens, revealed = short.tokens_BL[row], short.revealed_BL[row]
        skipped = revealed == AFTER_STOP
        assert (tokens[skipped] == pad).all()
        written = torch.isin(tokens, torch.tensor(stops)) & (revealed >= 0)
        if skipped.any():
            ended += 1
            assert written.any()
            assert int(written.nonzero()[0]) < int(skipped.nonzero()[0])
        calls = sorted(set(revealed[revealed >= 0].tolist()))
        assert calls == list(range(int(short.calls_B[row])))  # no call was wasted, none is missing
        last = list(event_states(tokens, revealed, MASK))
        assert torch.equal(last[-1], tokens)
        assert (last[0] == MASK).sum() == (revealed != GIVEN).sum()
        if options["order"] == "left_to_right":
            end = int(written.nonzero()[0]) if written.any() else LENGTH
            assert torch.equal(tokens[: end + 1], whole.tokens_BL[row][: end + 1])
            assert skipped[end + 1 :].all()
    assert ended > 0


# ---------------------------------------------------------------------------------------------------- guidance, blocks


def test_guidance_of_zero_is_none_and_more_sharpens_towards_the_prompt():
    x_BL, given_BL = canvas()
    plain = fill(SHIFTED, x_BL, given_BL, steps=4, seed=1)
    none = fill(SHIFTED, x_BL, given_BL, steps=4, seed=1, guidance=0.0)
    guided = fill(SHIFTED, x_BL, given_BL, steps=4, seed=1, guidance=4.0)
    assert torch.equal(plain.tokens_BL, none.tokens_BL)
    assert not torch.equal(plain.tokens_BL, guided.tokens_BL)
    assert guided.calls_B.tolist() == (2 * plain.calls_B).tolist()
    assert guided.launches == plain.launches


def test_guidance_without_a_prompt_changes_nothing():
    x_BL = torch.zeros(2, LENGTH, dtype=torch.int64)
    given_BL = torch.zeros_like(x_BL, dtype=torch.bool)
    given_BL[:, 0] = True  # the begin-of-text token is no condition
    options = {"steps": 6, "seed": 3, "draw": TokenDraw(strategy="greedy")}
    plain, guided = (fill(SHIFTED, x_BL, given_BL, guidance=g, **options) for g in (0.0, 3.0))
    assert torch.equal(plain.tokens_BL, guided.tokens_BL)


class BlockCausal(type(SHIFTED)):
    """The whole text in every call, under a block-causal mask."""

    def denoise(self, tokens_RL, where_RL):
        return self(tokens_RL, where=where_RL, allowed=block_causal_allowed(tokens_RL.shape[1], BLOCK))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{"steps": 3}, {"order": "random", "steps": 4}, {"threshold": 0.15}])
def test_the_prefix_cache_equals_whole_calls_under_a_block_causal_mask(name: str, options: dict):
    model = MODELS[name]
    x_BL = rows(4, LENGTH, seed=1)
    given_BL = torch.arange(LENGTH) < torch.tensor([1, 4, 7, 13])[:, None]
    cached = fill(model, x_BL, given_BL, cache="prefix", block_length=BLOCK, seed=2, max_rows=3, **options)
    whole = fill(
        BlockCausal(model.lm, model.mask_id, model.shift).eval(),
        x_BL,
        given_BL,
        block_length=BLOCK,
        seed=2,
        max_rows=3,
        **options,
    )
    assert torch.equal(cached.tokens_BL, whole.tokens_BL)
    assert torch.equal(cached.calls_B, whole.calls_B)


def test_a_cache_is_dropped_when_its_row_gets_another_text():
    denoise = PrefixCachedDenoiser(SHIFTED, BLOCK)
    where_RL = torch.zeros(2, LENGTH, dtype=torch.bool)
    where_RL[:, 2 * BLOCK + 1] = True
    numbers = torch.tensor([0, 1])
    outputs = []
    for seed in (1, 2, 1):
        tokens_RL = rows(2, LENGTH, seed=seed)
        outputs.append(denoise.at_rows(tokens_RL, where_RL, index_R=numbers, given_RL=~where_RL))
    fresh = PrefixCachedDenoiser(SHIFTED, BLOCK).at_rows(
        rows(2, LENGTH, seed=2), where_RL, index_R=numbers, given_RL=~where_RL
    )
    assert torch.equal(outputs[1], fresh)
    assert torch.equal(outputs[0], outputs[2])


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"order": "upwards"}, "choose one of random, first_hitting, confidence"),
        ({"steps": 0}, "at least 1"),
        ({"steps": 2, "threshold": 0.5}, "exclude each other"),
        ({"threshold": 1.0}, r"\[0, 1\)"),
        ({"commit": "binomial"}, "commit=fixed"),
        ({"order": "first_hitting", "steps": 3}, "leave out steps"),
        ({"cache": "prefix"}, "block_length"),
        ({"cache": "dual", "block_length": 2}, "choose one of none, prefix"),
        ({"cache": "prefix", "block_length": 2, "guidance": 1.0}, "exclude each other"),
        ({"cache": "prefix", "block_length": 4}, "cache=none to infill"),
        ({"guidance": -1}, "guidance=-1"),
        ({"block_length": 0}, "block_length=0"),
        ({"stop": [3]}, "needs pad"),
        ({"stop": [VOCAB], "pad": 0}, f"id {VOCAB} is outside"),
        ({"forbid": [-1]}, "id -1 is outside"),
        ({"forbid": list(range(VOCAB))}, "no token"),
        ({"draw": TokenDraw(strategy="top_k", para=VOCAB)}, f"from 1 to {VOCAB - 1}"),
        ({"temperature": 0.5}, "no sampler option"),
    ],
)
def test_bad_options_are_named(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        fill(SHIFTED, *canvas(), **options)


def test_a_text_the_model_cannot_predict_is_refused():
    x_BL, given_BL = canvas()
    free_first = given_BL.clone()
    free_first[1, 0] = False
    with pytest.raises(ConfigError, match="row 1: position 0 is not given"):
        fill(SHIFTED, x_BL, free_first)
    assert fill(MODELS["gpt2, no shift"], x_BL, free_first, steps=2).tokens_BL.shape == x_BL.shape
    with pytest.raises(ConfigError, match="both must be"):
        fill(SHIFTED, x_BL, given_BL[:, 1:])
    long = torch.zeros(1, 65, dtype=torch.int64)
    with pytest.raises(ConfigError, match="exceeds the model's 64"):
        fill(SHIFTED, long, torch.ones_like(long))
