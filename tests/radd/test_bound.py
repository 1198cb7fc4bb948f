"""Exact bounds by enumeration: equalities between the losses, orders and ranges that the estimators must meet."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from common.diffusion.schedules import Geometric, LogLinear
from common.errors import ConfigError
from common.seeding import generator
from common.testing.golden import fill
from radd.bound import enumerate_bound, t_dce_excess, t_dse_expectation
from radd.losses import compute_loss, draw_loss_inputs, ordered_nll
from radd.model import RADD, ModelConfig

TOKENS, LENGTH = 6, 5


@pytest.fixture(scope="module")
def model() -> RADD:
    config = ModelConfig(hidden_size=16, n_blocks=1, n_heads=2, length=LENGTH, dropout=0.0)
    return fill(RADD(config, TOKENS), 9, skip=("rotary_emb.inv_freq",)).eval()


def denoiser(model):
    return lambda tokens, where: model(tokens, where=where)


@pytest.fixture(scope="module")
def x_L():
    return torch.tensor([5, 2, 2, 4, 1])


@pytest.fixture(scope="module")
def bound(model, x_L):
    return enumerate_bound(denoiser(model), x_L, mask_id=TOKENS)


def test_bound_is_the_mean_nll_over_all_orders(model, x_L, bound):
    assert bound.all_order_nll().mean() == pytest.approx(bound.ao, rel=1e-5)
    for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        chain = ordered_nll(denoiser(model), x_L[None], torch.tensor(order), mask_id=TOKENS)
        assert chain.item() == pytest.approx(bound.order_nll(order), rel=1e-5)


def test_rows_per_call_does_not_matter(model, x_L, bound):
    again = enumerate_bound(denoiser(model), x_L, mask_id=TOKENS, rows_per_call=3)
    np.testing.assert_allclose(again.mean_nll_k, bound.mean_nll_k, rtol=1e-5)


def test_t_values_are_the_integrals_they_stand_for(bound):
    """The incomplete beta formula against numerical integration over t of the binomial mixture of S_k."""
    delta, eps = 1e-3, 1e-3

    def dse(t: float) -> float:
        level = (1 - eps) * t
        mean_s = sum(
            math.comb(LENGTH, k) * level**k * (1 - level) ** (LENGTH - k) * bound.mean_nll_k[k - 1]
            for k in range(1, LENGTH + 1)
        )
        return mean_s / t

    def excess(t: float) -> float:
        level = (1 - eps) * t
        return level / t * math.log(level / (1 - level))  # sigma/e * E[k]/L * ln e

    expected = quad(dse, delta, 1)[0] / (1 - delta)
    assert bound.t_dse(delta) == pytest.approx(expected, rel=1e-9)
    assert t_dce_excess() == pytest.approx(quad(excess, delta, 1)[0] / (1 - delta), rel=1e-5)
    assert t_dce_excess() == pytest.approx(-7e-6, abs=5e-7)
    assert bound.t_dce() == pytest.approx(bound.t_dse() + LENGTH * t_dce_excess())


def test_t_values_tend_to_the_bound_without_their_margins(bound):
    assert bound.t_dse(0.0, 0.0) == pytest.approx(bound.ao, rel=1e-12)
    assert bound.t_dce(0.0, 0.0) == pytest.approx(bound.ao, rel=1e-12)
    gaps = [abs(bound.t_dse(eps, eps) - bound.ao) for eps in (1e-2, 1e-3, 1e-4)]
    assert gaps[0] > gaps[1] > gaps[2]
    first_order = 1e-3 * (bound.ao - LENGTH * bound.mean_nll_k[0] - bound.mean_nll_k[-1])
    assert bound.t_dse() - bound.ao == pytest.approx(first_order, rel=0.05)


def test_first_order_correction_of_a_large_model_is_half_a_percent():
    """3.6 nats on average, 2 given everything else, 7 given nothing: -0.0054 nats per token."""
    length = 200
    k = np.arange(1, length + 1)
    per_token = 2 + 5 * (k / length) ** (5 / 1.6 - 1)  # mean 3.6 over levels, ends 2 and 7
    value = t_dse_expectation(per_token * k)
    assert (value - per_token.sum()) / length == pytest.approx(-0.0054, abs=2e-4)


@pytest.mark.parametrize(
    "loss_type,schedule",
    [
        *((name, LogLinear()) for name in ("t_DSE", "t_DCE", "lambda_DCE", "k_DCE")),
        *((name, Geometric()) for name in ("t_DSE", "t_DCE")),  # the others do not use the schedule
    ],
)
@torch.no_grad()
def test_estimators_are_unbiased_for_their_exact_values(model, x_L, bound, loss_type, schedule):
    expected = {"t_DSE": bound.t_dse(), "t_DCE": bound.t_dce()}.get(loss_type, bound.ao)
    exact_range = isinstance(schedule, Geometric)  # its levels end elsewhere; over the full range all agree
    if exact_range:
        expected = bound.ao
    rows, values = 4000, []
    for seed in range(5):
        draws = draw_loss_inputs(
            loss_type, rows, LENGTH, generator_for=lambda p, s=seed: generator(s, p), sampler="naive"
        )
        values.append(compute_loss(loss_type, model, x_L.expand(rows, -1), draws, schedule, exact_range=exact_range))
    values = torch.cat(values)
    error = values.std().item() / len(values) ** 0.5
    assert abs(values.mean().item() - expected) < 4 * error


@torch.no_grad()
def test_exact_range_removes_the_bias_of_the_t_losses(model, x_L, bound):
    """Stratified draws make the Monte-Carlo error smaller than the bias that the option removes."""
    rows = 60_000
    draws = draw_loss_inputs("t_DSE", rows, LENGTH, generator_for=lambda p: generator(0, p), sampler="stratified")
    # A constant network isolates the level's law from the network: S = k, so S_k = k and the bound is L.
    exact, plain = (
        compute_loss(
            "t_DSE",
            lambda z, x, where: torch.ones(int(where.sum())),
            x_L.expand(rows, -1),
            draws,
            LogLinear(),
            mask_id=TOKENS,
            exact_range=exact_range,
        )
        for exact_range in (True, False)
    )
    assert t_dse_expectation(np.arange(1.0, LENGTH + 1)) == pytest.approx(LENGTH * (1 - 1e-3), rel=1e-6)
    error = exact.std().item() / rows**0.5
    assert abs(exact.mean().item() - LENGTH) < 4 * error
    assert abs(plain.mean().item() - LENGTH * (1 - 1e-3)) < 4 * error


def test_a_network_that_knows_the_distribution_reaches_the_entropy_in_every_order():
    """Table lookup on a random joint distribution over 3^3 sequences, its conditionals as the denoiser."""
    tokens, length = 3, 3
    joint = torch.rand([tokens] * length, generator=generator(0, "joint"), dtype=torch.float64)
    joint /= joint.sum()

    def denoise(tokens_RL, where_RL):
        rows = []
        for row, where in zip(tokens_RL, where_RL):
            table = joint
            for position, token in enumerate(row.tolist()):
                if token != tokens:
                    table = table.index_select(position, torch.tensor([token]))
            table = table / table.sum()
            for position in where.nonzero().flatten().tolist():
                others = [axis for axis in range(length) if axis != position]
                rows.append(torch.cat([table.sum(dim=others).log(), torch.tensor([-torch.inf]).double()]))
        return torch.stack(rows)

    entropy = -(joint * joint.log()).sum().item()
    expected_bound, spread = 0.0, 0.0
    for sequence in itertools.product(range(tokens), repeat=length):
        bound = enumerate_bound(denoise, torch.tensor(sequence), mask_id=tokens)
        orders = bound.all_order_nll()
        spread = max(spread, orders.max() - orders.min())
        expected_bound += joint[sequence].item() * bound.ao
    assert expected_bound == pytest.approx(entropy, rel=1e-6)
    assert spread < 1e-6


def test_sequences_too_long_to_enumerate_are_refused(model):
    with pytest.raises(ConfigError, match="length=17"):
        enumerate_bound(denoiser(model), torch.zeros(17, dtype=torch.long), mask_id=TOKENS)
