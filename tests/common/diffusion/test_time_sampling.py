"""Time draws: one value per stratum over the whole batch, uniform margins, refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.diffusion.time_sampling import decoupled_times, draw_times, stratified_times, vdm_times
from common.errors import ConfigError
from common.seeding import generator


def strata(times: torch.Tensor) -> list[int]:
    return sorted((times.double() * len(times)).floor().long().tolist())


@given(size=st.integers(1, 300), seed=st.integers(0, 2**31 - 1))
def test_decoupled_and_stratified_put_one_value_into_each_stratum(size, seed):
    rng = generator(seed, "test")
    u_B = torch.rand(size, generator=rng, dtype=torch.float64)
    assert strata(decoupled_times(u_B)) == list(range(size))
    assert strata(stratified_times(u_B, torch.randperm(size, generator=rng))) == list(range(size))


@given(size=st.integers(1, 300), seed=st.integers(0, 2**31 - 1))
def test_vdm_values_are_evenly_spaced_after_rotation(size, seed):
    u0 = torch.rand(1, generator=generator(seed, "test"), dtype=torch.float64)
    spaced = vdm_times(u0, size).sort().values
    gaps = torch.cat([spaced.diff(), spaced[:1] + 1 - spaced[-1:]])
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / size), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sampler", ["vdm", "decoupled", "stratified"])
def test_strata_cover_the_global_batch_whatever_ranks_and_micro_batches(sampler):
    """W ranks x A micro-batches of m rows together hold one value per stratum of 1/(W A m)."""
    world, accumulation, micro = 3, 2, 4
    times = draw_times(sampler, world * accumulation * micro, generator=generator(0, "time", 7))
    parts = [
        times[(a * world + r) * micro : (a * world + r + 1) * micro] for r in range(world) for a in range(accumulation)
    ]
    together = torch.cat(parts)
    if sampler == "vdm":  # rotate the grid so that it starts at zero
        together = torch.remainder(together - together.min() + 1e-3 / len(together), 1)
    assert strata(together) == list(range(len(times)))


@pytest.mark.parametrize("sampler", ["naive", "vdm", "decoupled", "stratified"])
@pytest.mark.parametrize("antithetic", [False, True])
def test_draws_are_uniform_in_the_unit_interval(sampler, antithetic):
    draws = torch.stack(
        [draw_times(sampler, 5, generator=generator(s, "time"), antithetic=antithetic) for s in range(2000)]
    )
    assert draws.dtype == torch.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean().item() - 0.5) < 5 * (1 / 12 / 2000) ** 0.5  # as if the rows of a draw were equal
    if antithetic or sampler != "decoupled":  # which ties a row to its stratum
        assert (draws.mean(dim=0) - 0.5).abs().max() < 5 * (1 / 12 / 2000) ** 0.5


def test_antithetic_rows_come_in_pairs_that_sum_to_one():
    times = draw_times("stratified", 8, generator=generator(1, "time"), antithetic=True)
    torch.testing.assert_close(times[0::2] + times[1::2], torch.ones(4))


def test_same_seed_and_step_give_the_same_times():
    first = draw_times("stratified", 16, generator=generator(3, "time", 5))
    assert torch.equal(first, draw_times("stratified", 16, generator=generator(3, "time", 5)))
    assert not torch.equal(first, draw_times("stratified", 16, generator=generator(3, "time", 6)))


def test_largest_value_stays_below_one_although_the_rule_rounds_up(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda size, generator: torch.full((size,), 1 - 2**-24))
    assert decoupled_times(torch.rand(16, None)).max() == 1
    assert draw_times("decoupled", 16, generator=generator(0, "time")).max() < 1


def test_unknown_sampler_is_refused():
    with pytest.raises(ConfigError, match=r"training\.time_sampler='strat'"):
        draw_times("strat", 4, generator=generator(0, "time"))
    with pytest.raises(ConfigError, match="at least one row"):
        draw_times("naive", 0, generator=generator(0, "time"))
