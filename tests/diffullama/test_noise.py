"""Noise: masked at the rate asked for, given positions never, strata that cover the global batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.seeding import generator
from diffullama.noise import add_noise, add_noise_coupled, add_noise_discrete, sample_time, stratified_time

MASK = 5


def uniforms(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=generator(seed, "noise"))


@given(rows=st.integers(1, 5), length=st.integers(1, 20), seed=st.integers(0, 1000))
def test_tokens_are_kept_or_masked_and_given_ones_always_kept(rows, length, seed):
    rng = generator(seed, "tokens")
    x_BL = torch.randint(0, 9, (rows, length), generator=rng)  # the mask's id among them
    given_BL = torch.randint(0, 2, (rows, length), generator=rng)
    t_B = sample_time(torch.rand(rows, generator=rng))
    z_BL, drawn_BL = add_noise(x_BL, t_B, torch.rand(rows, length, generator=rng), MASK, given_BL)
    assert torch.equal(z_BL, torch.where(drawn_BL, MASK, x_BL))
    assert not (drawn_BL & given_BL.bool()).any()


def test_the_share_of_masked_tokens_is_the_time():
    t_B = torch.tensor([0.001, 0.25, 0.8, 1.0])
    _, drawn_BL = add_noise(torch.zeros(4, 40_000, dtype=torch.int64), t_B, uniforms(4, 40_000), MASK)
    assert torch.allclose(drawn_BL.float().mean(1), t_B, atol=0.01)
    assert drawn_BL[3].all()


def test_times_lie_between_eps_and_one():
    assert sample_time(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([1e-3, 1.0])
    assert sample_time(torch.tensor([0.0]), eps=0.1).item() == pytest.approx(0.1)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_strata_of_all_ranks_together_cover_the_batch_once(world):
    v = 0.37
    parts = [stratified_time(8 // world, v, rank, world) for rank in range(world)]
    r_B = torch.cat(parts)
    assert torch.equal(r_B, stratified_time(8, v))
    assert ((r_B * 8).floor().sort().values == torch.arange(8)).all()
    assert len(r_B.unique()) == 8  # no two ranks draw the same time


def test_stratified_times_have_the_uniform_mean_with_less_variance():
    draws = torch.stack([stratified_time(16, v).mean() for v in uniforms(400)])
    plain = uniforms(400, 16, seed=1).mean(1)
    assert draws.mean().item() == pytest.approx(0.5, abs=0.01)
    assert draws.var() < plain.var() / 10


def test_discrete_times_are_the_grid_of_continuous_ones():
    x_BL, u_BL, step_B = torch.zeros(3, 50, dtype=torch.int64), uniforms(3, 50), torch.tensor([1, 4, 8])
    assert torch.equal(add_noise_discrete(x_BL, step_B, 8, u_BL, MASK)[0], add_noise(x_BL, step_B / 8, u_BL, MASK)[0])


def test_coupled_noise_is_nested_where_the_times_differ():
    rows, length, steps = 6, 2000, 10
    x_BL = torch.zeros(rows, length, dtype=torch.int64)
    t1_B, t2_B = torch.tensor([9, 3, 5, 10, 1, 7]), torch.tensor([4, 8, 5, 1, 10, 7])
    given_BL = torch.zeros(rows, length)
    given_BL[:, :10] = 1
    u1, u2, u3 = uniforms(rows, length, seed=1), uniforms(rows, length, seed=2), uniforms(2, length, seed=3)
    z, masked, t = add_noise_coupled(x_BL, t1_B, t2_B, steps, u1, u2, u3, MASK, given_BL)
    high, low = masked.split(rows)
    assert torch.equal(t, torch.cat([torch.maximum(t1_B, t2_B), torch.minimum(t1_B, t2_B)]))
    assert torch.equal(z == MASK, masked) and not masked[:, :10].any()
    differ = t1_B != t2_B
    assert not (low & ~high)[differ].any()  # a subset
    assert (low & ~high)[~differ].any()  # drawn afresh
    assert torch.allclose(masked[:, 10:].float().mean(1), t / steps, atol=0.05)
