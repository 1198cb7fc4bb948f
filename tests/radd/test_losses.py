"""The four losses: identities that the paper proves, finiteness at the edges, draws, and orders."""

import math

import pytest
import torch
from torch.nn import functional as F

from common.diffusion.schedules import Geometric, LogLinear
from common.errors import ConfigError
from common.seeding import generator
from common.testing.golden import fill
from radd.losses import (
    LOSS_TYPES,
    LossConfig,
    build_order,
    check_order,
    compute_loss,
    corrupt,
    draw_loss_inputs,
    full_range,
    ordered_nll,
    sequence_losses,
)
from radd.model import RADD, ModelConfig

TOKENS, LENGTH, ROWS = 19, 12, 6
SCHEDULES = [LogLinear(), Geometric()]


@pytest.fixture(scope="module")
def model() -> RADD:
    config = ModelConfig(hidden_size=32, n_blocks=2, n_heads=4, length=LENGTH, dropout=0.0)
    return fill(RADD(config, TOKENS), 5, skip=("rotary_emb.inv_freq",)).eval()


@pytest.fixture(scope="module")
def x_BL() -> torch.Tensor:
    return torch.randint(0, TOKENS, (ROWS, LENGTH), generator=generator(0, "clean"))


def draws_for(loss_type: str, rows: int = ROWS, length: int = LENGTH, seed: int = 0, **options) -> dict:
    return draw_loss_inputs(loss_type, rows, length, generator_for=lambda purpose: generator(seed, purpose), **options)


def gradient(loss_B, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss_B.mean(), list(model.parameters()))])


def masked_nll(model, x_BL, state):
    return sequence_losses(
        type(state)(state.z_BL, state.where_BL, torch.ones(len(x_BL)), torch.zeros(len(x_BL))),
        model(state.z_BL, x_BL, state.where_BL),
    )


# ---------------------------------------------------------------- identities


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_t_dce_exceeds_t_dse_by_a_term_without_parameters(model, x_BL, schedule):
    draws = draws_for("t_DSE")
    t_B = (1 - 1e-3) * draws["time"].double() + 1e-3
    e_B = torch.expm1(schedule.sigma(t_B))
    dse, dce = (compute_loss(name, model, x_BL, draws, schedule) for name in ("t_DSE", "t_DCE"))
    k_B = corrupt("t_DSE", x_BL, draws, schedule, mask_id=TOKENS).where_BL.sum(dim=1)
    excess = schedule.dsigma(t_B) / e_B * k_B * e_B.log()
    torch.testing.assert_close(dce.double() - dse.double(), excess, rtol=1e-5, atol=2e-5 * dce.abs().max().item())
    torch.testing.assert_close(gradient(dce, model), gradient(dse, model), rtol=1e-5, atol=1e-7)


def test_t_dse_equals_the_reference_expression_with_all_its_terms(model, x_BL):
    """sigma * sum [(-log c + ln e)/e + sum_v exp(log c_v - ln e) + (1/e)(ln(1/e) - 1)], in float64."""
    schedule, draws = LogLinear(), draws_for("t_DSE")
    state = corrupt("t_DSE", x_BL, draws, schedule, mask_id=TOKENS)
    t_B = (1 - 1e-3) * draws["time"].double() + 1e-3
    e_B1 = torch.expm1(schedule.sigma(t_B))[:, None]
    log_c_BLV = model(state.z_BL)[..., :TOKENS].double()
    nll_BL = -log_c_BLV.gather(-1, x_BL[..., None]).squeeze(-1)
    positive_BL = (log_c_BLV - e_B1[..., None].log()).exp().sum(-1)
    per_token_BL = (nll_BL + e_B1.log()) / e_B1 + positive_BL + (1 / e_B1) * ((1 / e_B1).log() - 1)
    expected_B = schedule.dsigma(t_B) * (per_token_BL * state.where_BL).sum(-1)
    got_B = compute_loss("t_DSE", model, x_BL, draws, schedule)
    torch.testing.assert_close(got_B.double(), expected_B, rtol=1e-5, atol=1e-4)


def test_losses_are_the_masked_nll_over_the_level(model, x_BL):
    draws = draws_for("t_DSE")
    state = corrupt("t_DSE", x_BL, draws, LogLinear(), mask_id=TOKENS)
    t_B = (1 - 1e-3) * draws["time"] + 1e-3
    s_B = masked_nll(model, x_BL, state)
    torch.testing.assert_close(compute_loss("t_DSE", model, x_BL, draws, LogLinear()), s_B / t_B, rtol=1e-5, atol=1e-4)
    draws = draws_for("lambda_DCE")
    state = corrupt("lambda_DCE", x_BL, draws, LogLinear(), mask_id=TOKENS)
    expected = masked_nll(model, x_BL, state) / draws["lambda"]
    torch.testing.assert_close(compute_loss("lambda_DCE", model, x_BL, draws, LogLinear()), expected)
    draws = draws_for("k_DCE")
    state = corrupt("k_DCE", x_BL, draws, LogLinear(), mask_id=TOKENS)
    expected = masked_nll(model, x_BL, state) * LENGTH / draws["k"]
    torch.testing.assert_close(compute_loss("k_DCE", model, x_BL, draws, LogLinear()), expected)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weighted_output_of_the_model_has_the_loss_and_its_gradient(model, x_BL, loss_type):
    """What training uses (gradients made in the forward pass) against the loss per sequence."""
    draws = draws_for(loss_type)
    state = corrupt(loss_type, x_BL, draws, LogLinear(), mask_id=TOKENS)
    total, _ = model(state.z_BL, x_BL, state.where_BL, state.weight_B)
    loss_B = compute_loss(loss_type, model, x_BL, draws, LogLinear())
    torch.testing.assert_close(total + state.offset_B.sum(), loss_B.sum(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient(total / ROWS, model), gradient(loss_B, model), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("schedule", [*SCHEDULES, Geometric(1e-4, 300.0)])
@pytest.mark.parametrize("loss_type", ["t_DSE", "t_DCE"])
@pytest.mark.parametrize("exact_range", [False, True])
def test_t_losses_are_finite_at_every_time(model, schedule, loss_type, exact_range):
    time_B = torch.cat([torch.tensor([0.0, 2**-24, 1e-6, 1 - 2**-24]), torch.linspace(0, 0.999, 20)])
    x_BL = torch.zeros(len(time_B), LENGTH, dtype=torch.long)
    for bf16 in (False, True):
        draws = {"time": time_B, "u_mask": torch.rand(x_BL.shape, generator=generator(0, "mask"))}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss_B = compute_loss(loss_type, model, x_BL, draws, schedule, exact_range=exact_range)
        assert loss_B.dtype == torch.float32
        assert loss_B.isfinite().all()
        assert gradient(loss_B, model).isfinite().all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("length", [1, 5])
def test_extreme_levels_and_single_tokens_are_finite(model, loss_type, length):
    x_BL = torch.zeros(2, length, dtype=torch.long)
    if loss_type == "k_DCE":
        draws = {"k": torch.tensor([1, length]), "perm": torch.arange(length).expand(2, length)}
    else:
        draws = {"time": torch.tensor([0.0, 1.0]), "lambda": torch.tensor([0.0, 1.0])}
        draws["u_mask"] = torch.full((2, length), 0.5)  # nothing masked in the first row, everything in the second
    loss_B = compute_loss(loss_type, model, x_BL, draws, LogLinear())
    assert loss_B.isfinite().all()
    if loss_type != "k_DCE":
        assert loss_B[0] == 0
        assert loss_B[1] > 0


def test_lambda_of_zero_is_clamped(model):
    x_BL = torch.zeros(1, LENGTH, dtype=torch.long)
    draws = {"lambda": torch.zeros(1), "u_mask": torch.zeros(1, LENGTH)}
    assert compute_loss("lambda_DCE", model, x_BL, draws, LogLinear()).isfinite().all()


def test_unknown_loss_is_refused_with_the_nearest_name(x_BL):
    with pytest.raises(ConfigError, match=r"training\.loss_type='t_dce'.*Did you mean 't_DCE'"):
        draws_for("t_dce")
    with pytest.raises(ConfigError, match="loss_type"):
        LossConfig(loss_type="k_DSE")
    with pytest.raises(ConfigError, match="sampling_eps"):
        LossConfig(sampling_eps=0.0)
    with pytest.raises(ConfigError, match="time_sampler"):
        LossConfig(time_sampler="sobol")


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_draws_depend_on_the_seed_only_and_have_a_row_per_sample(loss_type):
    first, again, other = (draws_for(loss_type, seed=seed) for seed in (1, 1, 2))
    assert first.keys() == again.keys()
    for name in first:
        assert first[name].shape[0] == ROWS
        assert torch.equal(first[name], again[name])
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("sampler", [None, "naive", "stratified"])
def test_mask_counts_are_uniform_over_one_to_length(sampler):
    counts = torch.cat([draws_for("k_DCE", 50, 10, seed, sampler=sampler)["k"] for seed in range(100)])
    assert (counts.min(), counts.max()) == (1, 10)
    frequency = counts.bincount(minlength=11)[1:].double()
    assert (frequency - 500).abs().max() < 5 * (5000 * 0.1 * 0.9) ** 0.5
    if sampler == "stratified":
        one_batch = draws_for("k_DCE", 50, 10, sampler="stratified")["k"]
        assert one_batch.bincount(minlength=11)[1:].tolist() == [5] * 10


@pytest.mark.parametrize("loss_type,name", [("t_DSE", "time"), ("lambda_DCE", "lambda")])
def test_default_levels_are_stratified_over_the_batch_in_random_order(loss_type, name):
    level = draws_for(loss_type, 64, LENGTH)[name]
    rotated = level if loss_type == "lambda_DCE" else torch.remainder(level - level.min() + 1e-4, 1)
    assert sorted((rotated * 64).long().tolist()) == list(range(64))
    assert not torch.equal(level, level.sort().values)


def test_antithetic_counts_mirror_each_other():
    k_B = draws_for("k_DCE", 40, 9, antithetic=True)["k"]
    assert ((k_B[0::2] + k_B[1::2] - 10).abs() <= 1).all()


def test_exact_range_spreads_the_draws_over_every_level():
    """Each schedule's draws, weighted, integrate 1/level over (0, 1]: also levels beyond the schedule's own."""
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    for schedule in (LogLinear(), Geometric(0.05, 2.0)):
        level, weight, log_e = full_range(u, schedule)
        assert level.min() < 1e-5
        assert level.max() > 1 - 1e-5
        # E[level * weight] is the integral of d level; E[level^3 * weight] that of level^2: 1/3.
        assert (level * weight).mean().item() == pytest.approx(1, rel=1e-4)
        assert (level**3 * weight).mean().item() == pytest.approx(1 / 3, rel=1e-4)
        # t_DCE's extra term k ln e / level has expectation L ln(level / (1 - level)), which integrates to zero.
        assert (level * weight * log_e).mean().item() == pytest.approx(0, abs=1e-3)


# ---------------------------------------------------------------- orders


def test_ordered_nll_is_the_chain_of_conditionals(model, x_BL):
    orders_BL = build_order("ar_random", ROWS, LENGTH, generator=generator(0, "order"))
    expected_B = torch.zeros(ROWS)
    z_BL = torch.full_like(x_BL, TOKENS)
    rows = torch.arange(ROWS)
    for step in range(LENGTH):
        position_B = orders_BL[:, step]
        target_B = x_BL[rows, position_B]
        expected_B -= model(z_BL)[rows, position_B, target_B].detach()
        z_BL[rows, position_B] = target_B

    calls = []

    def denoise(tokens, where):
        calls.append(len(tokens))
        return model(tokens, where=where)

    got_B = ordered_nll(denoise, x_BL, orders_BL, mask_id=TOKENS)
    torch.testing.assert_close(got_B, expected_B, rtol=1e-5, atol=1e-4)
    assert calls == [ROWS] * LENGTH
    together_B = ordered_nll(denoise, x_BL, orders_BL, mask_id=TOKENS, rows_per_call=29)
    torch.testing.assert_close(together_B, got_B, rtol=1e-5, atol=1e-4)
    assert sum(calls[LENGTH:]) == ROWS * LENGTH


def test_backward_order_is_forward_order_reversed_and_random_orders_differ_by_row():
    forward, backward = build_order("ar_forward", 2, 5), build_order("ar_backward", 2, 5)
    assert forward[0].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(backward, forward.flip(1))
    random = build_order("ar_random", 2, 50, generator=generator(0, "order"))
    assert not torch.equal(random[0], random[1])
    with pytest.raises(ConfigError, match="generator"):
        build_order("ar_random", 2, 5)
    with pytest.raises(ConfigError, match="ar_forwards"):
        build_order("ar_forwards", 2, 5)


@pytest.mark.parametrize(
    "order", [[0, 1, 1], [0, 1, 3], [-1, 0, 1], [0, 1], [[0, 1, 2], [0, 0, 1]], [0.0, 1.0, 2.0], [[[0, 1, 2]]]]
)
def test_what_is_no_permutation_is_refused(order):
    with pytest.raises(ConfigError, match="order"):
        check_order(torch.tensor(order), 3)


def test_long_training_loss_stays_finite_where_float16_sums_would_overflow():
    """64 nats per token over 2,048 tokens: beyond float16's 65,504, and no longer exact in bfloat16."""
    nll_P = torch.full((2048,), 64.0)
    where_BL = torch.ones(1, 2048, dtype=torch.bool)
    draws = {"k": torch.tensor([2048]), "perm": torch.arange(2048)[None]}
    x_BL = torch.zeros(1, 2048, dtype=torch.long)
    state = corrupt("k_DCE", x_BL, draws, LogLinear(), mask_id=9)
    assert torch.equal(state.where_BL, where_BL)
    assert sequence_losses(state, nll_P.half()).item() == 2048 * 64


def test_a_network_with_uniform_output_costs_ln_n_per_token():
    """Every loss of a fresh model is ln N per masked token times its weight: the expectation is L ln N."""

    def uniform(z_BL, x_BL, where_BL):
        return torch.full((int(where_BL.sum()),), math.log(TOKENS))

    x_BL = torch.zeros(400, LENGTH, dtype=torch.long)
    for loss_type in LOSS_TYPES:
        values = [
            compute_loss(
                loss_type, uniform, x_BL, draws_for(loss_type, 400, seed=seed), LogLinear(), mask_id=TOKENS
            ).mean()
            for seed in range(20)
        ]
        mean, error = torch.stack(values).mean(), torch.stack(values).std() / 20**0.5
        assert abs(mean - LENGTH * math.log(TOKENS)) < 4 * error + 0.01


def test_dense_cross_entropy_is_the_masked_nll(model, x_BL):
    state = corrupt("k_DCE", x_BL, draws_for("k_DCE"), LogLinear(), mask_id=TOKENS)
    logits = model.logits(state.z_BL)[..., :TOKENS]
    dense = F.cross_entropy(logits.flatten(0, 1), x_BL.flatten(), reduction="none").view_as(x_BL)
    expected = (dense * state.where_BL).sum(dim=1)
    torch.testing.assert_close(masked_nll(model, x_BL, state), expected, rtol=1e-5, atol=1e-5)
