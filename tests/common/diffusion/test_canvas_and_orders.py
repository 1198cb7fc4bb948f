"""What is given, in which order the rest is filled, and the rules that look at predictions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.diffusion.canvas import build_canvas
from common.diffusion.decoding import sample_by_selection
from common.diffusion.orders import SelectionRule, build_order, check_order, score_positions
from common.diffusion.reveal import GIVEN, ordered_events, ranks, split_events
from common.errors import ConfigError
from common.testing.toy_denoiser import ConstantDenoiser, ToyDenoiser


def test_prefix_suffix_and_fixed_positions_are_written():
    tokens_BL = build_canvas(2, 8, 9, num_tokens=9, prefix=[1, 2], suffix=[3], fixed={4: 5})
    assert tokens_BL.tolist() == [[1, 2, 9, 9, 5, 9, 9, 3]] * 2
    assert torch.equal(tokens_BL, build_canvas(2, 8, 9, num_tokens=9, fixed=([1, 2, 5, 3], [0, 1, 4, 7])))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prefix": [1] * 5, "suffix": [1] * 4}, "do not fit into length=8.*at least 9"),
        ({"prefix": [10]}, "ids run from 0 to 9"),
        ({"suffix": [11]}, "id 11 at position 7"),
        ({"fixed": {8: 1}}, r"position 8 is outside 0\.\.7"),
        ({"fixed": {-1: 1}}, "position -1"),
        ({"prefix": [1], "fixed": {0: 2}}, "already given as id 1"),
        ({"fixed": ([1, 2], [3])}, "2 ids for 1 positions"),
        ({"fixed": ([1, 2], [3, 3])}, "twice"),
        ({"length": 0}, "length"),
    ],
)
def test_impossible_canvases_are_refused(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        build_canvas(**({"size": 1, "length": 8, "mask_id": 10, "num_tokens": 10} | options))


@pytest.mark.parametrize(
    "order, message",
    [
        ([0, 1, 2], "3 positions, but length=4"),
        ([0, 1, 2, 2], "not a permutation"),
        ([0, 1, 2, 4], "not a permutation"),
        ([[0, 1, 2, 3], [3, 2, 1, -1]], "not a permutation"),
        ([0.0, 1.0, 2.0, 3.0], "integers"),
        ([[0, 1, 2, 3], [3, 2]], "equally long"),
        ("forward", "not a list"),
    ],
)
def test_orders_that_are_no_permutation_are_refused(order, message: str):
    with pytest.raises(ConfigError, match=message):
        check_order(order, 4)


def test_random_orders_belong_to_rows():
    together, alone = (build_order("random", 12, rows=rows, seed=1) for rows in ([4, 7, 9], [7]))
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])
    with pytest.raises(ConfigError, match="choose one of random"):
        build_order("middle_out", 4, rows=[0], seed=0)


@given(length=st.integers(1, 30), steps=st.integers(1, 40), seed=st.integers(0, 99))
def test_counts_of_a_split_differ_by_at_most_one(length: int, steps: int, seed: int):
    draw = torch.Generator().manual_seed(seed)
    free_BL = torch.rand(3, length, generator=draw) < 0.7
    event_BL = split_events(ranks(torch.rand(3, length, generator=draw), free_BL), free_BL, steps)
    for free_L, event_L in zip(free_BL, event_BL):
        counts = torch.bincount(event_L[free_L]) if free_L.any() else torch.empty(0, dtype=torch.int64)
        assert (event_L[~free_L] == GIVEN).all()
        assert len(counts) == min(steps, int(free_L.sum()))
        assert not len(counts) or counts.max() - counts.min() <= 1
        assert counts.tolist() == sorted(counts.tolist(), reverse=True)


def test_several_positions_per_call_follow_the_order():
    free_BL = torch.tensor([[True, True, False, True, True]])
    assert ordered_events(torch.tensor([4, 3, 2, 1, 0]), free_BL, per_call=2).tolist() == [[1, 1, GIVEN, 0, 0]]


def test_scores_rank_confident_predictions_first():
    sharp, flat, tie = [0.9, 0.05, 0.05], [0.4, 0.3, 0.3], [0.5, 0.5, 0.0]
    log_probs_PV = torch.tensor([flat, tie, sharp]).log()
    drawn_P, position_P = torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2])
    best = {
        order: score_positions(order, log_probs_PV, drawn_P, position_P).argsort(descending=True).tolist()
        for order in ("confidence", "entropy", "margin", "left_to_right")
    }
    assert best == {
        "confidence": [2, 1, 0],
        "entropy": [2, 1, 0],
        "margin": [2, 0, 1],
        "left_to_right": [0, 1, 2],
    }


@pytest.mark.parametrize("order", ["random", "left_to_right", "confidence", "margin", "entropy"])
@pytest.mark.parametrize("limit", [{"per_call": 2}, {"steps": 2}, {"steps": 50}])
def test_fixed_counts_give_fixed_numbers_of_calls(order: str, limit: dict):
    toy = ToyDenoiser(length=5)
    tokens_BL = toy.canvas(8)
    tokens_BL[0] = torch.tensor([0, 1, 2, 0, 1])
    tokens_BL[1, 2] = 1
    rule = SelectionRule(order=order, **limit)
    result = sample_by_selection(toy, tokens_BL, rule, mask_id=3, max_rows=3)
    free_B = (tokens_BL == 3).sum(1)
    assert result.calls_B.tolist() == [rule.max_calls(int(free)) for free in free_B]
    assert (result.tokens_BL < 3).all()
    assert torch.equal(result.revealed_BL == GIVEN, tokens_BL != 3)


@pytest.mark.parametrize("limit", [{"threshold": 0.8}, {"entropy_bound": 0.3}, {"threshold": 0.0}])
def test_adaptive_counts_fill_at_least_one_position_per_call(limit: dict):
    toy = ToyDenoiser(length=4)
    result = sample_by_selection(toy, toy.canvas(40), SelectionRule(**limit), mask_id=3)
    assert (result.tokens_BL < 3).all()
    assert (result.calls_B <= 4).all()
    if limit == {"threshold": 0.0}:
        assert (result.calls_B == 1).all()


def test_a_high_threshold_fills_certain_positions_together():
    sure = torch.tensor([0.97, 0.01, 0.02])
    denoise = ConstantDenoiser(sure)
    options = {"mask_id": 3, "seed": 2}
    every = sample_by_selection(denoise, torch.full((20, 12), 3), SelectionRule(threshold=0.5), **options)
    none = sample_by_selection(denoise, torch.full((20, 12), 3), SelectionRule(threshold=0.98), **options)
    assert every.nfe < 3
    assert (none.calls_B == 12).all()


def test_the_entropy_bound_limits_the_positions_of_a_call():
    denoise = ConstantDenoiser(torch.tensor([0.25, 0.25, 0.25, 0.25]))  # ln 4 nats each
    for bound, calls in [(0.0, 12), (1.5 * math.log(4), 6), (3.5 * math.log(4), 3), (1e9, 1)]:
        rule = SelectionRule(order="entropy", entropy_bound=bound)
        result = sample_by_selection(denoise, torch.full((2, 12), 4), rule, mask_id=4)
        assert result.calls_B.tolist() == [calls, calls]


def test_selection_depends_on_the_row_alone():
    toy = ToyDenoiser(length=5)
    for rule in (
        SelectionRule(per_call=2),
        SelectionRule(order="random", per_call=1),
        SelectionRule(noise=0.5, steps=3),
    ):
        together = sample_by_selection(toy, toy.canvas(9), rule, mask_id=3, seed=4)
        in_turn = sample_by_selection(toy, toy.canvas(9), rule, mask_id=3, seed=4, max_rows=2)
        alone = sample_by_selection(toy, toy.canvas(1), rule, mask_id=3, seed=4, rows=[6])
        assert torch.equal(together.tokens_BL, in_turn.tokens_BL)
        assert torch.equal(together.tokens_BL[6:7], alone.tokens_BL)


def test_blocks_are_completed_before_the_next_begins():
    toy = ToyDenoiser(length=5)
    rule = SelectionRule(per_call=1)
    result = sample_by_selection(toy, toy.canvas(10), rule, mask_id=3, block_length=2)
    for revealed_L in result.revealed_BL:
        assert revealed_L[:2].max() < revealed_L[2:4].min()
        assert revealed_L[4] == 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"order": "magic", "per_call": 1}, "choose one of random"),
        ({}, "exactly one of per_call"),
        ({"per_call": 1, "steps": 2}, "exactly one"),
        ({"per_call": 0}, "at least 1"),
        ({"threshold": 1.0}, r"\[0, 1\)"),
        ({"entropy_bound": -1}, "at least 0"),
    ],
)
def test_rules_without_meaning_are_refused(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        SelectionRule(**options)
