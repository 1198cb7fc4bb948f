"""Corruption: tokens stay or become the mask, in the right number."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from common.diffusion.corruption import mask_bernoulli, mask_count, random_permutations
from common.seeding import generator

shapes = st.tuples(st.integers(1, 5), st.integers(1, 40))


@given(shape=shapes, seed=st.integers(0, 2**31 - 1))
def test_each_token_stays_or_becomes_the_mask(shape, seed):
    rng = generator(seed, "test")
    x_BL = torch.randint(0, 50, shape, generator=rng)
    probability_B = torch.rand(shape[0], generator=rng)
    z_BL = mask_bernoulli(x_BL, probability_B, torch.rand(shape, generator=rng), 50)
    assert ((z_BL == x_BL) | (z_BL == 50)).all()
    everything = mask_bernoulli(x_BL, torch.ones(shape[0]), torch.rand(shape, generator=rng), 50)
    assert (everything == 50).all()


@given(shape=shapes, seed=st.integers(0, 2**31 - 1))
def test_count_corruption_masks_exactly_k_positions(shape, seed):
    rng = generator(seed, "test")
    x_BL = torch.randint(0, 50, shape, generator=rng)
    count_B = torch.randint(0, shape[1] + 1, shape[:1], generator=rng)
    z_BL = mask_count(x_BL, count_B, random_permutations(*shape, generator=rng), 50)
    assert ((z_BL == x_BL) | (z_BL == 50)).all()
    assert torch.equal((z_BL == 50).sum(dim=1), count_B)


def test_masked_share_follows_the_probability():
    rng = generator(0, "test")
    probability_B = torch.tensor([0.1, 0.5, 0.9])
    z_BL = mask_bernoulli(
        torch.zeros(3, 20_000, dtype=torch.long), probability_B, torch.rand(3, 20_000, generator=rng), 9
    )
    share_B = (z_BL == 9).float().mean(dim=1)
    assert ((share_B - probability_B).abs() < 4 * (probability_B * (1 - probability_B) / 20_000).sqrt()).all()


def test_permutations_are_permutations_and_reach_every_order():
    permutations = random_permutations(6000, 3, generator=generator(0, "test"))
    orders, counts = permutations.unique(dim=0, return_counts=True)
    assert len(orders) == 6
    assert ((counts - 1000).abs() < 4 * (6000 * (1 / 6) * (5 / 6)) ** 0.5).all()
