"""Nucleus, top-k and lowest-k filters: what stays, at least one token, bad options."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from diffullama.filters import lowest_k, top_k_filter, top_p_filter

LEAST = torch.finfo(torch.float32).min


@given(seed=st.integers(0, 10_000), p=st.floats(0.01, 0.99), columns=st.integers(1, 12))
def test_the_nucleus_is_the_smallest_set_whose_mass_exceeds_p(seed: int, p: float, columns: int):
    logits = 3 * torch.randn(4, columns, generator=torch.Generator().manual_seed(seed))
    kept = top_p_filter(logits, p) > LEAST
    probs = logits.double().softmax(-1)
    for row in range(4):
        mass = probs[row][kept[row]].sum()
        smallest = probs[row][kept[row]].min()
        assert mass >= min(p, 1.0) - 1e-5 or kept[row].all()
        assert mass - smallest <= p + 1e-5
        assert (probs[row][~kept[row]] <= smallest + 1e-12).all()


def test_at_p_one_nothing_is_dropped():
    logits = torch.linspace(0, -40, 50)[None]
    assert torch.equal(top_p_filter(logits, 1.0), logits)


def test_top_k_keeps_k_and_ties():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0]])
    assert (top_k_filter(logits, 1) > LEAST).tolist() == [[False, True, False, False]]
    assert (top_k_filter(logits, 2) > LEAST).tolist() == [[False, True, True, True]]
    assert torch.equal(top_k_filter(logits, 9), logits)


@given(seed=st.integers(0, 10_000), k=st.integers(0, 8))
def test_lowest_k_marks_k_distinct_scores(seed: int, k: int):
    scores = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    low = lowest_k(scores, k)
    assert (low.sum(1) == k).all()
    for row in range(3):
        assert k in (0, 8) or scores[row][low[row]].max() < scores[row][~low[row]].min()


def test_ties_at_the_cutoff_give_fewer():
    assert lowest_k(torch.tensor([[0.0, 1.0, 1.0, 2.0]]), 2).sum() == 1
    assert not lowest_k(torch.zeros(2, 5), torch.tensor([1, 4])).any()


@pytest.mark.parametrize("p", [0.0, -0.1, 1.1, float("nan")])
def test_p_outside_its_range_is_refused(p: float):
    with pytest.raises(ConfigError, match=r"\(0, 1\]"):
        top_p_filter(torch.zeros(1, 3), p)


def test_k_below_one_is_refused():
    with pytest.raises(ConfigError, match="top_k=0"):
        top_k_filter(torch.zeros(1, 3), 0)
