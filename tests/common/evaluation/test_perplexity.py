"""The likelihood-bound estimators: unbiased, exact where they say so, and worth their forwards."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.errors import ConfigError
from common.evaluation.perplexity import (
    GroupEstimate,
    MaskedRows,
    combine,
    conditional_replicates,
    enumeration_rows,
    estimate_bound,
    estimate_group,
    evaluate_rows,
    nll_of,
    order_rows,
    sweep_counts,
    sweep_replicates,
    sweep_rows,
    sweep_sizes,
)
from common.seeding import generator

TOKENS = 5


class PairDenoiser:
    """Log-probabilities that depend on the position, on how many tokens are visible, and on which."""

    def __init__(self, length: int, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.bias_LV = torch.randn(length, TOKENS + 1, generator=rng) * 1.5
        self.pair_LLV = torch.randn(length, length, TOKENS + 1, generator=rng) * 0.5 / math.sqrt(length)
        self.rows = 0

    def __call__(self, tokens_RL: Tensor, where_RL: Tensor) -> Tensor:
        self.rows += len(tokens_RL)
        visible_RL = (tokens_RL != TOKENS).float()
        value_RL = visible_RL * (tokens_RL.float() - 2)
        logits_RLV = self.bias_LV + torch.einsum("rk,lkv->rlv", value_RL, self.pair_LLV)
        logits_PV = logits_RLV[where_RL].clone()
        logits_PV[:, TOKENS] = -torch.inf
        return logits_PV.log_softmax(-1)


def sequences(count: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, TOKENS, (count, length), generator=torch.Generator().manual_seed(seed))


def exact_bound(denoise: PairDenoiser, x_L: Tensor) -> float:
    rows = enumeration_rows(torch.arange(len(x_L)), len(x_L))
    return float(evaluate_rows(nll_of(denoise), x_L[None], rows, mask_id=TOKENS, batch_size=512).sum())


@given(length=st.integers(1, 60), data=st.data(), offset=st.floats(0, 1, exclude_max=True))
def test_sweep_counts_increase_and_stay_in_range(length: int, data: st.DataObject, offset: float):
    size = data.draw(st.integers(1, length))
    counts = sweep_counts(length, size, offset)
    assert len(counts) == size and counts[0] >= 1 and counts[-1] <= length
    assert (counts.diff() > 0).all()


def test_full_sweep_has_every_count_once_for_every_offset():
    for offset in (0.0, 0.3, 0.999999):
        assert sweep_counts(7, 7, offset).tolist() == [1, 2, 3, 4, 5, 6, 7]


@given(length=st.integers(1, 40), data=st.data(), seed=st.integers(0, 1000))
def test_a_sweep_scores_masked_positions_only_and_each_at_most_once(length: int, data: st.DataObject, seed: int):
    size = data.draw(st.integers(1, min(16, length)))
    order_BL = torch.randperm(length, generator=torch.Generator().manual_seed(seed))[None]
    rows = sweep_rows(order_BL, torch.tensor([0.37]), size)
    scored_RL = rows.weight_RL != 0
    assert not (scored_RL & ~rows.masked_RL).any()
    assert (scored_RL.sum(0) <= 1).all()
    # every row has the same total weight, L / S, whatever it scores
    assert torch.allclose(rows.weight_RL.sum(1), torch.full((size,), length / size), rtol=1e-5)


def test_orders_average_to_the_bound_and_every_estimator_is_unbiased():
    length = 5
    denoise, x_BL = PairDenoiser(length), sequences(2, length)
    expected = torch.tensor([exact_bound(denoise, x_L) for x_L in x_BL], dtype=torch.float64)
    orders = torch.stack([torch.tensor(order) for order in itertools.permutations(range(length))])
    values = []
    for row, x_L in enumerate(x_BL):
        rows = order_rows(orders)
        value_R = evaluate_rows(nll_of(denoise), x_L.expand(len(orders), length), rows, mask_id=TOKENS, batch_size=1000)
        values.append(float(value_R.sum()) / len(orders))
        assert values[row] == pytest.approx(float(expected[row]), rel=1e-6)
    for draws in (1, 2, 3, 5):
        many = [
            estimate_group(
                nll_of(denoise),
                x_BL,
                sweep_replicates(0, 2, length, draws=draws, seed=seed),
                mask_id=TOKENS,
                batch_size=64,
            )[0].mean(dim=0)
            for seed in range(400)
        ]
        estimate_SB = torch.stack(many)
        error_B = estimate_SB.std(dim=0) / math.sqrt(len(many))
        assert ((estimate_SB.mean(dim=0) - expected).abs() < 4 * error_B).all(), draws


def test_result_does_not_depend_on_the_batch_size_and_hardly_on_the_draws():
    denoise, x_NL = PairDenoiser(12), sequences(5, 12)
    estimates = [
        estimate_bound(denoise, x_NL, mask_id=TOKENS, draws=40, batch_size=size, group_size=2) for size in (1, 7, 64)
    ]
    for estimate in estimates[1:]:
        assert estimate.nats_per_token.value == pytest.approx(estimates[0].nats_per_token.value, rel=1e-6)
        assert estimate.nats_per_token.standard_error == pytest.approx(
            estimates[0].nats_per_token.standard_error, rel=1e-4
        )
    assert estimates[0].rows == 5 * 40 and estimates[0].tokens == 60
    more = estimate_bound(denoise, x_NL, mask_id=TOKENS, draws=400, seed=1)
    assert abs(more.nats_per_token.value - estimates[0].nats_per_token.value) < 5 * math.hypot(
        estimates[0].nats_per_token.standard_error, more.nats_per_token.standard_error
    )


def test_reported_error_matches_the_spread_over_seeds():
    denoise, x_NL = PairDenoiser(10), sequences(12, 10)
    found = [estimate_bound(denoise, x_NL, mask_id=TOKENS, draws=20, seed=s, group_size=4) for s in range(60)]
    spread = torch.tensor([f.nats_per_token.value for f in found], dtype=torch.float64).std()
    reported = torch.tensor([f.nats_per_token.standard_error**2 for f in found]).mean().sqrt()
    assert 0.7 < float(reported / spread) < 1.4


def test_a_sweep_reaches_the_error_of_independent_levels_with_a_quarter_of_the_rows():
    """Variance times rows, against S / lambda; benchmarks/radd_evaluation.py has a trained network."""
    length, denoise = 32, PairDenoiser(32, seed=3)
    x_BL = sequences(16, length)
    nll = nll_of(denoise)

    def independent(seed: int) -> Iterator[MaskedRows]:
        rng = generator(seed, "test")
        for _ in range(256):
            level_B = torch.rand(16, generator=rng).clamp(min=2**-24)
            where_BL = torch.rand(16, length, generator=rng) < level_B[:, None]
            yield MaskedRows(torch.arange(16), where_BL, where_BL / level_B[:, None])

    value_MB, rows = estimate_group(nll, x_BL, independent(0), mask_id=TOKENS, batch_size=512)
    lambda_cost = float(value_MB.var(dim=0).mean())
    by_seed = []
    for seed in range(8):
        replicates = sweep_replicates(0, 16, length, draws=64, seed=seed)
        value_MB, rows = estimate_group(nll, x_BL, replicates, mask_id=TOKENS, batch_size=512)
        assert rows == 16 * 64
        by_seed.append(value_MB)
    sweeps_MB = torch.cat(by_seed)
    sweep_cost = float(sweeps_MB.var(dim=0).mean()) * 16
    assert lambda_cost / sweep_cost > 4, (lambda_cost, sweep_cost)


@pytest.mark.parametrize(
    "draws, length, sizes", [(1, 64, [1]), (2, 64, [1, 1]), (33, 64, [11, 11, 11]), (5, 2, [2, 2, 1])]
)
def test_draws_are_divided_into_sweeps_of_at_most_the_length(draws: int, length: int, sizes: list[int]):
    assert sweep_sizes(draws, length) == sizes


def test_conditional_likelihood_keeps_the_prompt_visible_and_is_exact_for_one_token():
    denoise, x_L = PairDenoiser(9), sequences(1, 9)[0]
    hidden_L = torch.zeros(9, dtype=torch.bool)
    hidden_L[8] = True
    (rows,) = conditional_replicates(hidden_L, draws=1, rng=generator(0, "test"))
    assert len(rows) == 1
    value = evaluate_rows(nll_of(denoise), x_L[None], rows, mask_id=TOKENS, batch_size=4)
    masked = x_L.masked_fill(hidden_L, TOKENS)[None]
    assert float(value) == pytest.approx(-float(denoise(masked, hidden_L[None])[0, x_L[8]]), rel=1e-6)
    hidden_L[3:] = True
    enumerated = sum(
        float(evaluate_rows(nll_of(denoise), x_L[None], rows, mask_id=TOKENS, batch_size=64).sum())
        for rows in conditional_replicates(hidden_L, draws=63, rng=generator(0, "test"))
    )
    sampled = [
        float(evaluate_rows(nll_of(denoise), x_L[None], rows, mask_id=TOKENS, batch_size=64).sum())
        for seed in range(300)
        for rows in conditional_replicates(hidden_L, draws=6, rng=generator(seed, "test"))
    ]
    values = torch.tensor(sampled, dtype=torch.float64)
    assert abs(float(values.mean()) - enumerated) < 4 * float(values.std()) / math.sqrt(len(values))
    for rows in conditional_replicates(hidden_L, draws=6, rng=generator(0, "test")):
        assert not rows.masked_RL[:, :3].any()


def test_groups_weigh_by_their_number_of_sequences():
    groups = [GroupEstimate([2.0, 4.0, 6.0], 0.09, 3), GroupEstimate([8.0], 0.07, 1)]
    bound = combine(groups, length=2)
    assert bound.nats_per_token.value == pytest.approx(20 / 4 / 2)
    assert bound.nats_per_token.standard_error == pytest.approx(0.4 / 4 / 2)
    assert bound.sequences == 4 and bound.rows == 4
    assert bound.perplexity.value == pytest.approx(math.exp(2.5))
    assert combine([GroupEstimate([2.0], None, 1)], length=2).nats_per_token.standard_error is None


def test_no_sequences_or_draws_is_an_error():
    with pytest.raises(ConfigError, match="no sequences"):
        estimate_bound(PairDenoiser(3), sequences(0, 3), mask_id=TOKENS, draws=1)
    with pytest.raises(ConfigError, match="draws=0"):
        sweep_sizes(0, 4)
