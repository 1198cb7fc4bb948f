"""Step-by-step sampling: caching, calls, and the bias of the reference's low-precision draws."""

import math

import pytest
import torch

from common.diffusion.categorical import TokenDraw, race
from common.diffusion.nfe import update_rate
from common.diffusion.schedules import LogLinear
from common.diffusion.stepwise import sample_stepwise, transition_weights
from common.errors import ConfigError
from common.testing.toy_denoiser import ConstantDenoiser, ToyDenoiser


@pytest.mark.parametrize("stages", [1, 2])
def test_cached_and_uncached_runs_agree_and_differ_in_calls(stages: int):
    toy = ToyDenoiser()
    rate_S = update_rate(LogLinear(), "tweedie", 10)
    options = {"mask_id": 3, "stages": stages, "seed": 1, "skip_filled": False, "record": True}
    cached = sample_stepwise(toy, toy.canvas(20), rate_S, **options)
    uncached = sample_stepwise(toy, toy.canvas(20), rate_S, cached=False, **options)
    assert all(torch.equal(a, b) for a, b in zip(cached.states, uncached.states))
    assert (uncached.calls_B == 10).all()
    assert torch.equal(cached.evaluated_SB[1:], cached.changed_SB[:-1])
    assert cached.evaluated_SB[0].all()
    assert cached.nfe < 5


@pytest.mark.parametrize("stages", [1, 2])
def test_rows_are_never_evaluated_more_often_than_they_change(stages: int):
    toy = ToyDenoiser()
    for steps in (1, 4, 50):
        result = sample_stepwise(
            toy, toy.canvas(30), update_rate(LogLinear(), "tweedie", steps), mask_id=3, stages=stages
        )
        assert torch.equal(result.calls_B, result.changed_SB.sum(0))
        assert (result.calls_B <= min(steps, 3)).all()
        assert (result.tokens_BL < 3).all()


def test_a_full_row_needs_no_call():
    toy = ToyDenoiser()
    tokens_BL = torch.tensor([[0, 1, 2], [3, 1, 2]])
    result = sample_stepwise(toy, tokens_BL, update_rate(LogLinear(), "tweedie", 8), mask_id=3)
    assert result.calls_B.tolist() == [0, 1]
    assert torch.equal(result.tokens_BL[0], tokens_BL[0])


def test_a_row_does_not_depend_on_its_company():
    toy = ToyDenoiser()
    rate_S = update_rate(LogLinear(), "tweedie", 6)
    together = sample_stepwise(toy, toy.canvas(8), rate_S, mask_id=3, seed=4)
    alone = [
        sample_stepwise(toy, toy.canvas(1), rate_S, mask_id=3, seed=4, rows=[row]).tokens_BL[0] for row in range(8)
    ]
    assert torch.equal(together.tokens_BL, torch.stack(alone))


@pytest.mark.parametrize("precision, stages", [("float64", 1), ("float64", 2), ("float32", 2)])
def test_unbiased_draws_keep_the_tail_of_a_zipf_distribution(precision: str, stages: int):
    tokens, positions = (200, 300) if stages == 1 else (2000, 500)
    p_V = 1 / torch.arange(1, tokens + 1, dtype=torch.float64)
    p_V /= p_V.sum()
    result = sample_stepwise(
        ConstantDenoiser(p_V),
        torch.full((1, positions), tokens),
        update_rate(LogLinear(), "tweedie", 1024),
        mask_id=tokens,
        draw=TokenDraw(precision=precision),
        stages=stages,
        seed=1,
    )
    tail = float(p_V[tokens // 8 :].sum())
    share = float((result.tokens_BL >= tokens // 8).double().mean())
    assert abs(share - tail) < 3 * math.sqrt(tail * (1 - tail) / positions)


def first_step_share(precision: str, probability: float, steps: int) -> float:
    """How often a token is drawn in the first of n steps, as a multiple of what its probability asks for.

    Exact for the arithmetic of ``precision``: averages over quantiles of the mask's uniform and over all uniforms of
    the token that can win (float32: the largest on its grid of 2^-24; float64: the same interval, 64 times finer).
    """
    finer, dtype = (64, torch.float64) if precision == "float64" else (1, torch.float32)
    quantiles, widest = 300, 160
    log_probs_1V = torch.tensor([[probability, 1 - probability, 0.0]], dtype=torch.float64).log()
    weights_V = transition_weights(log_probs_1V, 1 / steps, 2, precision)[0].to(dtype)
    weights_V[1] = 0  # against the mask alone: whoever else wins does so with probability 1/n
    grid_G = 1 - (torch.arange(widest * finer, dtype=torch.float64) + (0.5 if finer > 1 else 1)) / (finer * 2**24)
    mask_Q = (torch.arange(quantiles, dtype=torch.float64) + 0.5) / quantiles
    pairs_PV = torch.stack([*torch.meshgrid(grid_G, mask_Q, indexing="ij")], -1).flatten(0, 1)
    uniform_PV = torch.stack([pairs_PV[:, 0], torch.full((len(pairs_PV),), 0.5).double(), pairs_PV[:, 1]], -1).to(dtype)
    wins = (race(weights_V.expand(len(uniform_PV), -1), uniform_PV) == 0).sum()
    return float(wins) / quantiles / (finer * 2**24) / (probability / steps)


def test_the_reference_precision_silences_rare_tokens_more_the_more_steps_there_are():
    shares = {
        (precision, steps): first_step_share(precision, 1e-4, steps)
        for precision in ("float64", "float32", "float16-compat")
        for steps in (128, 1024, 4096)
    }
    assert all(shares["float64", steps] == pytest.approx(1, abs=0.02) for steps in (128, 1024, 4096))
    assert shares["float32", 128] > shares["float32", 1024] > shares["float32", 4096]
    assert shares["float32", 1024] < 0.8
    assert shares["float32", 4096] < 0.25
    assert shares["float16-compat", 4096] == 0  # 1e-4 / 4096 is zero in half precision


@pytest.mark.parametrize(
    "draw, stages, message",
    [
        (TokenDraw(strategy="top_p"), 1, "strategy=direct"),
        (TokenDraw(temperature=0.5), 1, "temperature=1"),
        (TokenDraw(precision="float16-compat"), 2, "float16-compat"),
    ],
)
def test_combinations_that_have_no_meaning_are_refused(draw: TokenDraw, stages: int, message: str):
    toy = ToyDenoiser()
    with pytest.raises(ConfigError, match=message):
        sample_stepwise(toy, toy.canvas(1), torch.ones(2), mask_id=3, draw=draw, stages=stages)
