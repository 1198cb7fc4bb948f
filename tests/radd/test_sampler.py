"""RADD's samplers with its network: complete texts, calls as predicted, independence of the batch, bad options."""

import math

import pytest
import torch

from common.diffusion.categorical import TokenDraw
from common.diffusion.orders import SelectionRule
from common.diffusion.reveal import GIVEN
from common.diffusion.samplers import (
    DiffusionSampler,
    FirstHittingSampler,
    OrderedSampler,
    Sampler,
    SelectionSampler,
)
from common.diffusion.schedules import Geometric, LogLinear
from common.errors import ConfigError
from common.testing.golden import fill
from radd.model import RADD, ModelConfig
from radd.sampler import network

TOKENS, LENGTH = 11, 16


@pytest.fixture(scope="module")
def model() -> RADD:
    config = ModelConfig(hidden_size=16, n_blocks=1, n_heads=2, length=LENGTH, dropout=0.0)
    return fill(RADD(config, TOKENS), 3, skip=("rotary_emb.inv_freq",)).eval()


def samplers(model: RADD) -> dict[str, Sampler]:
    net = network(model)
    return {
        "tweedie": DiffusionSampler(net, LogLinear(), steps=12),
        "euler": DiffusionSampler(
            net, Geometric(), method="euler", steps=5, draw=TokenDraw(strategy="top_p", para=0.9)
        ),
        "stepwise": DiffusionSampler(net, LogLinear(), steps=12, event_driven=False),
        "stepwise_top_k": DiffusionSampler(
            net, LogLinear(), steps=12, event_driven=False, draw=TokenDraw(strategy="top_k", para=4)
        ),
        "blocks": DiffusionSampler(net, LogLinear(), steps=3, block_length=5),
        "first_hitting": FirstHittingSampler(net, draw=TokenDraw(temperature=0.7)),
        "ordered": OrderedSampler(net, draw=TokenDraw(strategy="top_k", para=3)),
        "ordered_pairs": OrderedSampler(net, "backward", per_call=2),
        "confidence": SelectionSampler(net, SelectionRule(per_call=3)),
        "random_counts": SelectionSampler(net, SelectionRule(order="random", steps=4)),
        "left_blocks": SelectionSampler(net, SelectionRule(order="left_to_right", per_call=2), block_length=4),
        "threshold": SelectionSampler(net, SelectionRule(order="margin", threshold=0.3)),
    }


NAMES = list(samplers(RADD(ModelConfig(hidden_size=16, n_blocks=1, n_heads=2), TOKENS)))


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_complete_keep_what_is_given_and_cost_what_is_predicted(name: str, model: RADD):
    sampler = samplers(model)[name]
    tokens_BL = sampler.canvas(24, LENGTH, prefix=[1, 2], suffix=[3], fixed={8: 4})
    result = sampler.sample(tokens_BL, seed=1)
    given_BL = tokens_BL != TOKENS
    assert (result.tokens_BL < TOKENS).all()
    assert torch.equal(result.tokens_BL[given_BL], tokens_BL[given_BL])
    assert torch.equal(result.revealed_BL == GIVEN, given_BL)
    expected = sampler.expected_calls(tokens_BL[0] == TOKENS)
    if expected.is_bound:
        assert (result.calls_B <= expected.mean).all()
    else:
        assert abs(result.nfe - expected.mean) <= 4 * math.sqrt(expected.variance / 24) + 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_rows_depend_on_seed_and_number_alone(name: str, model: RADD):
    sampler = samplers(model)[name]
    together = sampler.sample(sampler.canvas(6, LENGTH), seed=5)
    in_turn = sampler.sample(sampler.canvas(6, LENGTH), seed=5, max_rows=2)
    streamed = {row.index: row for row in sampler.stream(sampler.canvas(1, LENGTH)[0], [5, 1], seed=5, max_rows=1)}
    assert torch.equal(together.tokens_BL, in_turn.tokens_BL)
    assert torch.equal(streamed[5].tokens_L, together.tokens_BL[5])
    assert torch.equal(streamed[1].tokens_L, together.tokens_BL[1])
    assert not torch.equal(together.tokens_BL, sampler.sample(sampler.canvas(6, LENGTH), seed=6).tokens_BL)


@pytest.mark.parametrize("name", NAMES)
def test_a_full_canvas_needs_no_call(name: str, model: RADD):
    sampler = samplers(model)[name]
    tokens_BL = sampler.canvas(2, LENGTH, prefix=[5] * LENGTH)
    result = sampler.sample(tokens_BL)
    assert result.calls_B.tolist() == [0, 0]
    assert torch.equal(result.tokens_BL, tokens_BL)
    assert sampler.expected_calls(tokens_BL[0] == TOKENS).mean == 0


def test_narrow_filters_are_greedy_and_agree(model: RADD):
    options = [
        {"strategy": "top_k", "para": 1},
        {"strategy": "top_p", "para": 1e-6},
        {"temperature": 0.0},
    ]
    results = []
    for option in options:
        sampler = OrderedSampler(network(model), "forward", draw=TokenDraw(**option))
        results.append(sampler.sample(sampler.canvas(2, LENGTH), seed=len(results)).tokens_BL)
    assert all(torch.equal(results[0], other) for other in results)


def test_rows_can_have_their_own_order(model: RADD):
    orders = [list(range(LENGTH)), list(range(LENGTH - 1, -1, -1))]
    sampler = OrderedSampler(network(model), orders)
    result = sampler.sample(sampler.canvas(2, LENGTH))
    assert result.revealed_BL.tolist() == orders
    with pytest.raises(ConfigError, match="order has 2 rows, but row 2"):
        sampler.sample(sampler.canvas(3, LENGTH))


def test_no_rows_are_no_error(model: RADD):
    sampler = FirstHittingSampler(network(model))
    assert sampler.sample(sampler.canvas(0, LENGTH)).tokens_BL.shape == (0, LENGTH)
    assert list(sampler.stream(sampler.canvas(1, LENGTH)[0], [])) == []


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda n: DiffusionSampler(n, LogLinear(), method="analytic"), "choose one of tweedie, euler"),
        (lambda n: DiffusionSampler(n, LogLinear(), steps=0), "at least 1"),
        (
            lambda n: DiffusionSampler(n, LogLinear(), draw=TokenDraw(strategy="beam")),
            "choose one of direct, top_p, top_k",
        ),
        (lambda n: DiffusionSampler(n, LogLinear(), draw=TokenDraw(strategy="top_p", para=0.0)), r"\(0, 1\]"),
        (lambda n: DiffusionSampler(n, LogLinear(), draw=TokenDraw(strategy="top_p", para=1.1)), r"\(0, 1\]"),
        (lambda n: DiffusionSampler(n, LogLinear(), draw=TokenDraw(strategy="top_k", para=0)), "from 1"),
        (lambda n: DiffusionSampler(n, LogLinear(), draw=TokenDraw(strategy="top_k", para=12)), "from 1 to 11"),
        (lambda n: DiffusionSampler(n, LogLinear(), draw=TokenDraw(precision="float16-compat")), "sampler=stepwise"),
        (lambda n: DiffusionSampler(n, LogLinear(), block_length=0), "block_length=0"),
        (lambda n: OrderedSampler(n, "sideways"), "choose one of random"),
        (lambda n: OrderedSampler(n, [0, 1]).sample(torch.full((1, LENGTH), TOKENS)), "2 positions, but length=16"),
        (lambda n: OrderedSampler(n, [0] * LENGTH).sample(torch.full((1, LENGTH), TOKENS)), "not a permutation"),
        (lambda n: FirstHittingSampler(n).canvas(1, 4, prefix=[1] * 3, suffix=[1] * 2), "do not fit into length=4"),
        (lambda n: FirstHittingSampler(n).canvas(1, 4, prefix=[TOKENS]), "ids run from 0 to 10"),
    ],
)
def test_impossible_options_are_refused(build, message: str, model: RADD):
    with pytest.raises(ConfigError, match=message):
        build(network(model))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_samples_what_the_cpu_samples(name: str, model: RADD):
    on_cpu = samplers(model)[name]
    on_gpu = samplers(model.to("cuda"))[name]
    try:
        sampled = on_gpu.sample(on_gpu.canvas(6, LENGTH, prefix=[1, 2]), seed=2)
    finally:
        model.to("cpu")
    # float32 sums differ in their last bits, so a draw may fall on the other side of a boundary, though rarely
    same = sampled.tokens_BL.cpu() == on_cpu.sample(on_cpu.canvas(6, LENGTH, prefix=[1, 2]), seed=2).tokens_BL
    assert same.double().mean() > 0.9
