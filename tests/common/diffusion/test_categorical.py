"""Draws of one token: filters, equivalences between strategies, unbiased tails."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.diffusion.categorical import TokenDraw, draw_tokens, probabilities
from common.errors import ConfigError


def random_logits(positions: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Log-probabilities with a last column, the mask's, of -inf."""
    logits_PV = 2 * torch.randn(positions, tokens + 1, generator=torch.Generator().manual_seed(seed))
    logits_PV[:, -1] = -torch.inf
    return torch.log_softmax(logits_PV, -1)


def uniforms(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(tokens=st.integers(2, 40), seed=st.integers(0, 1000), strategy=st.sampled_from(["direct", "top_p", "top_k"]))
def test_the_mask_column_is_never_drawn(tokens: int, seed: int, strategy: str):
    draw = TokenDraw(strategy=strategy, para={"direct": None, "top_p": 1.0, "top_k": tokens}[strategy])
    log_probs_PV = random_logits(30, tokens, seed)
    for uniform in (uniforms(30, seed=seed), uniforms(30, tokens, seed=seed), torch.full((30,), 1 - 2.0**-53)):
        assert (draw_tokens(log_probs_PV, uniform, draw) < tokens).all()


@pytest.mark.parametrize("columns", [None, 21])
def test_open_filters_equal_direct_for_the_same_uniforms(columns: int | None):
    log_probs_PV = random_logits(200, 20)
    uniform = uniforms(200) if columns is None else uniforms(200, columns)
    direct = draw_tokens(log_probs_PV, uniform)
    assert torch.equal(draw_tokens(log_probs_PV, uniform, TokenDraw(strategy="top_p", para=1.0)), direct)
    if columns is not None:  # a race of top_k takes its uniforms in the order of the probabilities
        uniform = uniform.gather(1, log_probs_PV.argsort(dim=-1, descending=True, stable=True))
    assert torch.equal(draw_tokens(log_probs_PV, uniform, TokenDraw(strategy="top_k", para=20)), direct)


@pytest.mark.parametrize(
    "draw",
    [
        TokenDraw(strategy="top_k", para=1),
        TokenDraw(strategy="top_p", para=1e-9),
        TokenDraw(strategy="min_p", para=1.0),
        TokenDraw(strategy="greedy"),
        TokenDraw(temperature=0.0),
        TokenDraw(strategy="top_k", para=1, precision="float32"),
    ],
)
def test_the_narrowest_filters_are_greedy(draw: TokenDraw):
    log_probs_PV = random_logits(100, 30)
    for uniform in (uniforms(100), uniforms(100, 30)):
        assert torch.equal(draw_tokens(log_probs_PV, uniform, draw), log_probs_PV.argmax(-1))


def test_top_p_keeps_the_token_that_crosses_p():
    log_probs_PV = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).log()
    kept = {p: (probabilities(log_probs_PV, TokenDraw(strategy="top_p", para=p)) > 0).sum() for p in (0.4, 0.6, 0.9)}
    assert kept == {0.4: 1, 0.6: 2, 0.9: 3}


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_inversion_and_race_draw_the_given_distribution(precision: str):
    p_V = torch.tensor([0.02, 0.5, 0.0, 0.18, 0.3], dtype=torch.float64)
    size, draw = 40_000, TokenDraw(precision=precision)
    for uniform in (uniforms(size), uniforms(size, 5)):
        ids = draw_tokens(p_V.log().float().expand(size, -1), uniform, draw)
        share = torch.bincount(ids, minlength=5) / size
        assert ((share - p_V).abs() <= 4.5 * (p_V * (1 - p_V) / size).sqrt()).all()


def test_temperature_sharpens_and_flattens():
    log_probs_PV = random_logits(1, 10)
    entropies = [
        torch.special.entr(probabilities(log_probs_PV, TokenDraw(temperature=t))).sum() for t in (0.3, 1.0, 3.0)
    ]
    assert entropies[0] < entropies[1] < entropies[2]


def test_a_row_is_drawn_alike_in_any_company():
    log_probs_PV, uniform_P = random_logits(50, 300), uniforms(50)
    for draw in (TokenDraw(), TokenDraw(strategy="top_p", para=0.7), TokenDraw(strategy="top_k", para=9)):
        together = draw_tokens(log_probs_PV, uniform_P, draw)
        alone = torch.cat([draw_tokens(log_probs_PV[i : i + 1], uniform_P[i : i + 1], draw) for i in range(50)])
        assert torch.equal(together, alone)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strategy": "topp"}, "choose one of direct, top_p, top_k.*Did you mean 'top_p'"),
        ({"strategy": "top_p", "para": 0.0}, r"\(0, 1\]"),
        ({"strategy": "top_p", "para": 1.2}, r"\(0, 1\]"),
        ({"strategy": "top_k", "para": 0.5}, "from 1"),
        ({"strategy": "top_k"}, "from 1"),
        ({"temperature": -1.0}, "at least 0"),
        ({"precision": "float128"}, "float64"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        TokenDraw(**options)


def test_top_k_above_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="from 1 to 20"):
        draw_tokens(random_logits(3, 20), uniforms(3), TokenDraw(strategy="top_k", para=21))
