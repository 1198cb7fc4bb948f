"""Event-driven, first-hitting and ordered sampling: the law, the number of calls, independence of the batch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from common.diffusion.absorbing import plan_rows, run_events, sample_event_driven, sample_ordered
from common.diffusion.canvas import build_canvas
from common.diffusion.categorical import TokenDraw
from common.diffusion.nfe import expected_nfe, nfe_variance, reveal_distribution, update_rate
from common.diffusion.orders import build_order
from common.diffusion.reveal import GIVEN, diffusion_events, event_states, ranks, row_uniforms
from common.diffusion.schedules import Geometric, LogLinear
from common.diffusion.stepwise import sample_stepwise
from common.testing.toy_denoiser import ConstantDenoiser, ToyDenoiser

SAMPLES = 20_000


def fast_uniforms(size: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Reveal levels and token uniforms of many rows from one generator."""
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(2, size, length, generator=draw, dtype=torch.float64).unbind(0)


class SharedUniforms:
    """One generator for all rows: quick for the many rows of a statistical test."""

    def __init__(self, seed: int, race: bool) -> None:
        self._generator, self._race = torch.Generator().manual_seed(seed), race

    def update(self, step_P, row_P, position_P):
        return torch.rand(len(row_P), generator=self._generator, dtype=torch.float64)

    def token(self, step_P, row_P, position_P, columns):
        shape = (len(row_P), columns) if self._race else (len(row_P),)
        return torch.rand(shape, generator=self._generator, dtype=torch.float64)


def same_law(counts_a: torch.Tensor, counts_b: torch.Tensor) -> float:
    """p-value of the hypothesis that two samples have one distribution; rare outcomes are pooled."""
    rare = counts_a + counts_b < 10
    table = torch.stack([torch.cat([c[~rare], c[rare].sum()[None]]) for c in (counts_a, counts_b)])
    return stats.chi2_contingency(table[:, table.sum(0) > 0].numpy()).pvalue


@pytest.mark.parametrize("method, schedule", [("tweedie", LogLinear()), ("euler", Geometric())])
@pytest.mark.parametrize("stages", [1, 2])
def test_event_driven_sampling_has_the_law_of_the_step_by_step_sampler(method: str, schedule, stages: int):
    toy, steps = ToyDenoiser(), 4
    rate_S = update_rate(schedule, method, steps)
    stepwise = sample_stepwise(
        toy,
        toy.canvas(SAMPLES),
        rate_S,
        mask_id=toy.mask_id,
        stages=stages,
        uniforms=SharedUniforms(1, race=stages == 1),
    )
    events = sample_event_driven(
        toy,
        toy.canvas(SAMPLES),
        mask_id=toy.mask_id,
        schedule=schedule,
        method=method,
        steps=steps,
        uniforms=fast_uniforms(SAMPLES, 3, seed=2),
    )
    assert same_law(toy.counts(stepwise.tokens_BL), toy.counts(events.tokens_BL)) > 1e-3
    # The number of calls has one law too.
    calls = [torch.bincount(result.calls_B, minlength=4) for result in (stepwise, events)]
    assert same_law(*calls) > 1e-3


def test_one_token_per_call_draws_from_the_joint_distribution():
    toy = ToyDenoiser()
    hitting = sample_event_driven(
        toy, toy.canvas(SAMPLES), mask_id=toy.mask_id, uniforms=fast_uniforms(SAMPLES, 3, seed=3)
    )
    assert (hitting.calls_B == 3).all()
    counts = toy.counts(hitting.tokens_BL)
    assert stats.chisquare(counts.numpy(), (toy.joint_K * SAMPLES).numpy()).pvalue > 1e-3


def test_first_hitting_order_is_uniform_and_its_times_follow_the_largest_of_k_uniforms():
    level_BL, _ = fast_uniforms(24_000, 4, seed=4)
    event_BL = diffusion_events(level_BL, torch.ones_like(level_BL, dtype=torch.bool), None)
    orders = torch.bincount((event_BL * torch.tensor([64, 16, 4, 1])).sum(1))
    orders = orders[orders > 0]
    assert len(orders) == 24
    assert stats.chisquare(orders.numpy()).pvalue > 1e-3
    # A level u is reached when the masking probability has fallen to the share 1 - u of its start.
    first_B = (1 - level_BL).amax(1)
    assert stats.kstest(first_B.numpy(), lambda x: x**4).pvalue > 1e-3


@pytest.mark.parametrize("steps", [8, 64, 512])
@pytest.mark.parametrize("schedule", [LogLinear(), Geometric()])
@pytest.mark.parametrize("given", [0, 24])
def test_measured_calls_agree_with_e_nfe(steps: int, schedule, given: int):
    denoise, size, length = ConstantDenoiser(torch.full((5,), 0.2)), 400, 64
    tokens_BL = build_canvas(
        size, length, 5, num_tokens=5, prefix=[1] * (given // 2), suffix=[2] * (given - given // 2)
    )
    result = sample_event_driven(denoise, tokens_BL, mask_id=5, schedule=schedule, steps=steps, seed=steps)
    mean = expected_nfe(steps, length - given, schedule)
    error = math.sqrt(nfe_variance(steps, length - given, schedule) / size)
    assert abs(result.nfe - mean) <= 4 * error + 1e-9
    assert (result.calls_B <= min(steps, length - given)).all()


@given(
    length=st.integers(1, 24),
    steps=st.one_of(st.none(), st.integers(1, 60)),
    seed=st.integers(0, 999),
    block=st.one_of(st.none(), st.integers(1, 9)),
    max_rows=st.one_of(st.none(), st.integers(1, 5)),
)
def test_samples_are_complete_and_given_positions_stay(length, steps, seed, block, max_rows):
    draw = torch.Generator().manual_seed(seed)
    mask_id = 7
    tokens_BL = torch.randint(0, mask_id + 1, (6, length), generator=draw)
    tokens_BL[0] = 3  # nothing to do
    before_BL = tokens_BL.clone()
    denoise = ConstantDenoiser(torch.full((mask_id,), 1 / mask_id))
    result = sample_event_driven(
        denoise,
        tokens_BL,
        mask_id=mask_id,
        schedule=LogLinear(),
        steps=steps,
        seed=seed,
        block_length=block,
        max_rows=max_rows,
    )
    given_BL = before_BL != mask_id
    assert torch.equal(tokens_BL, before_BL)
    assert torch.equal(result.tokens_BL[given_BL], before_BL[given_BL])
    assert (result.tokens_BL < mask_id).all()
    assert torch.equal(result.revealed_BL == GIVEN, given_BL)
    free_B = (~given_BL).sum(1)
    assert (result.calls_B <= free_B).all()
    assert result.calls_B[0] == 0
    if steps is None:
        assert torch.equal(result.calls_B, free_B)
    for row in range(6):
        states = list(event_states(result.tokens_BL[row], result.revealed_BL[row], mask_id))
        assert len(states) == result.calls_B[row] + 1
        assert torch.equal(states[0], before_BL[row])
        assert all((a != b).any() for a, b in zip(states, states[1:]))


def test_one_step_is_one_call_and_many_steps_at_most_one_per_token():
    toy = ToyDenoiser()
    one = sample_event_driven(toy, toy.canvas(50), mask_id=3, schedule=LogLinear(), steps=1)
    many = sample_event_driven(toy, toy.canvas(50), mask_id=3, schedule=LogLinear(), steps=100_000)
    assert (one.calls_B == 1).all()
    assert one.launches == 1
    assert (many.calls_B <= 3).all()


def test_a_row_does_not_depend_on_its_company():
    toy = ToyDenoiser()
    options = {"mask_id": 3, "schedule": LogLinear(), "steps": 6, "seed": 5}
    together = sample_event_driven(toy, toy.canvas(12), **options)
    in_turn = sample_event_driven(toy, toy.canvas(12), max_rows=2, **options)
    alone = [sample_event_driven(toy, toy.canvas(1), rows=[row], **options).tokens_BL[0] for row in range(12)]
    assert torch.equal(together.tokens_BL, in_turn.tokens_BL)
    assert torch.equal(together.tokens_BL, torch.stack(alone))
    other = sample_event_driven(toy, toy.canvas(12), rows=range(12, 24), **options)
    assert not torch.equal(together.tokens_BL, other.tokens_BL)
    assert torch.equal(together.tokens_BL, sample_event_driven(toy, toy.canvas(12), **options).tokens_BL)


def test_finished_rows_are_replaced_by_waiting_ones():
    denoise, size, length = ConstantDenoiser(torch.full((4,), 0.25)), 30, 40
    reveal_S = reveal_distribution(update_rate(LogLinear(), "tweedie", 40))
    level_BL, token_BL = row_uniforms(0, range(size), length)
    tokens_BL = torch.full((size, length), 4)
    plan = plan_rows(tokens_BL, diffusion_events(level_BL, tokens_BL == 4, reveal_S), token_BL)
    in_flight: list[int] = []
    rows = list(run_events(denoise, [plan], max_rows=4, on_launch=lambda index_R, _: in_flight.append(len(index_R))))
    assert sorted(row.index for row in rows) == list(range(size))
    assert all(count == 4 for count in in_flight[: -int(plan.calls_B.max())])
    assert sum(in_flight) == int(plan.calls_B.sum())
    assert torch.equal((tokens_BL == 4).all(), torch.tensor(True)), "the plan's tokens are left as they were"


def test_finer_grids_approach_the_first_hitting_order():
    level_BL, _ = row_uniforms(1, range(20), 16)
    free_BL = torch.ones_like(level_BL, dtype=torch.bool)
    fine = reveal_distribution(update_rate(LogLinear(), "tweedie", 2_000_000))
    assert torch.equal(diffusion_events(level_BL, free_BL, fine), ranks(level_BL, free_BL))


def test_blocks_are_filled_from_left_to_right():
    level_BL, _ = row_uniforms(2, range(8), 20)
    free_BL = torch.ones_like(level_BL, dtype=torch.bool)
    reveal_S = reveal_distribution(update_rate(LogLinear(), "tweedie", 3))
    event_BL = diffusion_events(level_BL, free_BL, reveal_S, block_length=5)
    blocks = event_BL.view(8, 4, 5)
    assert (blocks[:, :-1].amax(-1) < blocks[:, 1:].amin(-1)).all()
    assert ((event_BL.amax(1) + 1) <= 12).all()


@pytest.mark.parametrize("name", ["random", "random_shared", "forward", "backward"])
def test_ordered_sampling_visits_masked_positions_in_order(name: str):
    length, mask_id = 10, 5
    denoise = ConstantDenoiser(torch.full((mask_id,), 0.2))
    tokens_BL = build_canvas(4, length, mask_id, num_tokens=mask_id, prefix=[1, 2], fixed={6: 4})
    order = build_order(name, length, rows=range(4), seed=3)
    result = sample_ordered(denoise, tokens_BL, order, mask_id=mask_id)
    assert (result.calls_B == 7).all()
    assert torch.equal(result.tokens_BL[:, [0, 1, 6]], tokens_BL[:, [0, 1, 6]])
    for row in range(4):
        wanted = [p for p in order.expand(4, length)[row].tolist() if p not in (0, 1, 6)]
        assert result.revealed_BL[row].argsort(stable=True)[3:].tolist() == wanted
    if name == "random":
        assert len({tuple(row.tolist()) for row in result.revealed_BL}) > 1


def test_every_order_samples_the_joint_distribution():
    toy = ToyDenoiser(seed=1)
    orders = torch.stack([torch.randperm(3, generator=torch.Generator().manual_seed(row)) for row in range(3000)])
    result = sample_ordered(toy, toy.canvas(3000), orders, mask_id=3, seed=9)
    assert stats.chisquare(toy.counts(result.tokens_BL).numpy(), (toy.joint_K * 3000).numpy()).pvalue > 1e-3


def test_a_zipf_tail_survives_event_driven_draws_in_both_precisions():
    p_V = 1 / torch.arange(1, 8001, dtype=torch.float64)
    p_V /= p_V.sum()
    denoise, size, length = ConstantDenoiser(p_V), 60, 48
    for precision in ("float64", "float32"):
        result = sample_event_driven(
            denoise,
            torch.full((size, length), 8000),
            mask_id=8000,
            schedule=LogLinear(),
            steps=1024,
            draw=TokenDraw(precision=precision),
        )
        tail, total = p_V[1000:].sum(), size * length
        share = (result.tokens_BL >= 1000).double().mean()
        assert abs(share - tail) < 3 * math.sqrt(tail * (1 - tail) / total), precision
