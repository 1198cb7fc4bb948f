"""Learning-rate schedules, parameter groups and optimizer state by name."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from common.config import OptimConfig
from common.errors import ConfigError
from common.optim import (
    build_optimizer,
    decay_groups,
    empty_optimizer_tensors,
    learning_rate,
    optimizer_tensors,
    set_learning_rate,
)
from common.testing.golden import load_cases

CPU = torch.device("cpu")


def test_warm_up_matches_the_reference_trainer():
    case = load_cases("radd")["train_steps"]
    optimizer = case.config["optimizer"]
    config = OptimConfig(lr=optimizer["lr"], warmup=optimizer["warmup"])
    case.check("out_lr", torch.tensor([learning_rate(step, config, 1000) for step in (1, 2, 3)]))


def test_no_warm_up_starts_at_full_rate():
    assert learning_rate(1, OptimConfig(lr=0.5, warmup=0), 10) == 0.5


def test_cosine_ends_at_its_floor_and_is_half_way_in_the_middle():
    config = OptimConfig(lr=2.0, warmup=0, schedule="cosine", min_ratio=0.1)
    assert learning_rate(100, config, 100) == pytest.approx(0.2)
    assert learning_rate(50, config, 100) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(25, config, 100) == pytest.approx(2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi / 4))))


def test_wsd_is_flat_then_falls_linearly():
    config = OptimConfig(lr=1.0, warmup=10, schedule="wsd", decay_fraction=0.2)
    rates = [learning_rate(step, config, 100) for step in (5, 10, 80, 90, 100)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])


@given(
    step=st.integers(1, 500), total=st.integers(1, 400), warmup=st.integers(0, 50),
    schedule=st.sampled_from(["constant", "cosine", "wsd"]), floor=st.floats(0, 1), decay=st.floats(0, 1),
)  # fmt: skip
def test_rate_stays_between_zero_and_its_peak(step, total, warmup, schedule, floor, decay):
    config = OptimConfig(lr=0.3, warmup=warmup, schedule=schedule, min_ratio=floor, decay_fraction=decay)
    assert 0 <= learning_rate(step, config, total) <= 0.3 * (1 + 1e-12)


def test_group_scales_multiply_the_scheduled_rate():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = build_optimizer([{"params": [a]}, {"params": [b], "lr_scale": 0.25}], OptimConfig(), CPU)
    set_learning_rate(optimizer, 0.8)
    assert [group["lr"] for group in optimizer.param_groups] == [0.8, 0.2]


@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
def test_optimizer_kind_is_the_configured_one(kind: str):
    optimizer = build_optimizer([{"params": [nn.Parameter(torch.ones(2))]}], OptimConfig(optimizer=kind), CPU)
    assert type(optimizer).__name__ == kind
    assert optimizer.param_groups[0]["fused"]


def test_model_without_trainable_parameters_is_refused():
    with pytest.raises(ConfigError, match="no trainable parameter"):
        build_optimizer([{"params": []}], OptimConfig(), CPU)


def test_vectors_and_embeddings_do_not_decay():
    model = nn.ModuleDict({"e": nn.Embedding(5, 4), "l": nn.Linear(4, 4), "n": nn.LayerNorm(4)})
    decayed, rest = decay_groups(model, 0.1)
    assert [p.shape for p in decayed["params"]] == [(4, 4)]
    assert decayed["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0.0
    assert len(rest["params"]) == 4


def test_optimizer_state_survives_a_new_order_of_groups():
    def make(order: int) -> tuple[dict, torch.optim.Optimizer]:
        named = {name: nn.Parameter(torch.full((3,), float(i))) for i, name in enumerate(("a", "b"))}
        params = list(named.values())[::order]
        return named, build_optimizer([{"params": [p]} for p in params], OptimConfig(), CPU)

    named, optimizer = make(1)
    for i, p in enumerate(named.values()):
        p.grad = torch.full((3,), 1.0 + i)
    optimizer.step()
    saved = optimizer_tensors(named, optimizer)
    other, fresh = make(-1)
    for key, value in empty_optimizer_tensors(other, fresh, saved).items():
        value.copy_(saved[key])
    for name in named:
        for key, value in optimizer.state[named[name]].items():
            assert torch.equal(value, fresh.state[other[name]][key])
