"""Learning-rate schedules, parameter groups and optimizer state by name."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from common.adamw8bit import LEVELS, AdamW8bit, dequantise, quantise, rounding_thresholds
from common.config import OptimConfig, ParallelConfig, TrainerConfig
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


def test_lamb_continues_where_its_saved_state_ends():
    """timm counts steps in the groups, which checkpoints do not hold: a resumed run would correct its bias anew."""
    config = OptimConfig(optimizer="LAMB", lr=0.1)

    def make(values: torch.Tensor) -> tuple[dict, torch.optim.Optimizer]:
        named = {"a": nn.Parameter(values.clone())}
        return named, build_optimizer([{"params": list(named.values())}], config, CPU)

    def take(named: dict, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            named["a"].grad = 2 * named["a"].detach() + 1
            optimizer.step()

    named, optimizer = make(torch.arange(1.0, 4.0))
    take(named, optimizer, 3)
    saved = {name: value.clone() for name, value in optimizer_tensors(named, optimizer).items()}
    other, resumed = make(named["a"].detach())
    for key, value in empty_optimizer_tensors(other, resumed, saved).items():
        value.copy_(saved[key])
    take(named, optimizer, 2)
    take(other, resumed, 2)
    assert torch.equal(named["a"], other["a"])


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


# ------------------------------------------------------------------------------------------------ RPG's schedule


def test_lagged_cosine_repeats_the_first_rate_and_does_not_quite_end():
    config = OptimConfig(lr=2.0, warmup=0, schedule="cosine_lagged")
    rates = [learning_rate(step, config, 100) for step in range(1, 101)]
    assert rates[0] == rates[1] == 2.0
    assert rates[51] == pytest.approx(1.0)
    assert 0 < rates[-1] < 2.0 * 1e-2


def test_lagged_cosine_warms_up_from_its_factor():
    config = OptimConfig(lr=1.0, warmup=10, warmup_factor=0.1, schedule="cosine_lagged")
    assert [learning_rate(step, config, 100) for step in (1, 2, 7, 12)] == pytest.approx([0.1, 0.1, 0.55, 1.0])


def test_warm_up_of_one_step_at_full_rate_is_a_cosine_over_the_rest():
    config = OptimConfig(lr=1.0, warmup=1, warmup_factor=1.0, schedule="cosine_lagged")
    assert [learning_rate(step, config, 101) for step in (1, 2, 3)] == [1.0, 1.0, 1.0]
    assert learning_rate(53, config, 101) == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------ 8-bit AdamW


def test_codes_are_exact_on_average_and_close_each_time():
    x_KQ = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) ** 3
    decoded = [
        dequantise(*quantise(x_KQ, rounding_thresholds(step, CPU), torch.int8))
        for step in range(200)
    ]  # fmt: skip
    scale_K1 = x_KQ.abs().amax(1, keepdim=True)
    assert max(float(((found - x_KQ).abs() / scale_K1).max()) for found in decoded) < 0.032
    assert float(((torch.stack(decoded).mean(0) - x_KQ).abs() / scale_K1).max()) < 1e-3
    assert torch.equal(dequantise(*quantise(x_KQ * 0, rounding_thresholds(1, CPU), torch.int8)), x_KQ * 0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_codes_keep_tiny_values_apart_from_zero(dtype: torch.dtype):
    x_KQ = torch.full((1, 256), 1e-6)
    x_KQ[0, 0] = 1.0
    codes, scale_K = quantise(x_KQ, rounding_thresholds(3, CPU), dtype)
    assert int(codes[0, 0]) == LEVELS[dtype]
    assert scale_K.tolist() == [1.0]
    assert int(codes[0, 1:].min()) >= 3


def train_regression(kind: str, steps: int) -> tuple[float, torch.optim.Optimizer, nn.Module]:
    """A few hundred steps on a fixed linear problem; returns the last loss."""
    rng = torch.Generator().manual_seed(0)
    x, teacher = torch.randn(512, 96, generator=rng), torch.randn(96, 96, generator=rng) / 10
    model = nn.Linear(96, 96)
    with torch.no_grad():
        model.weight.copy_(torch.randn(96, 96, generator=rng) / 10)
        model.bias.zero_()
    config = OptimConfig(optimizer=kind, lr=1e-2, warmup=0, weight_decay=0.01)
    optimizer = build_optimizer([{"params": model.parameters(), "weight_decay": 0.01}], config, CPU)
    for step in range(steps):
        batch = x[step * 64 % 512 :][:64]
        loss = (model(batch) - batch @ teacher.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), optimizer, model


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the first parameter."""
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    return sum(value.numel() * value.element_size() for value in state.values())


def test_8bit_states_learn_as_well_and_take_a_quarter_of_the_memory():
    whole, adamw, _ = train_regression("AdamW", 150)
    small, eight, model = train_regression("AdamW8bit", 150)
    assert small < 1.15 * whole
    assert state_bytes(eight) < 0.26 * state_bytes(adamw)
    assert set(eight.state[model.bias]) == {"step", "exp_avg", "exp_avg_sq"}, "small parameters keep float32 moments"


def test_small_parameters_follow_adamw_exactly():
    a, b = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
    options = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    ours, torchs = AdamW8bit([a], **options), torch.optim.AdamW([b], **options)
    for step in range(5):
        for parameter, optimizer in ((a, ours), (b, torchs)):
            parameter.grad = torch.linspace(-1, 1, 8) * (step + 1)
            optimizer.step()
    assert torch.allclose(a, b, rtol=1e-5, atol=0)


def test_8bit_state_survives_saving_bit_for_bit():
    _, optimizer, model = train_regression("AdamW8bit", 3)
    named = dict(model.named_parameters())
    saved = {key: value.clone() for key, value in optimizer_tensors(named, optimizer).items()}
    other = nn.Linear(96, 96)
    other.load_state_dict(model.state_dict())
    other_named = dict(other.named_parameters())
    config = OptimConfig(optimizer="AdamW8bit", lr=1e-2, weight_decay=0.01)
    fresh = build_optimizer([{"params": list(other_named.values()), "weight_decay": 0.01}], config, CPU)
    for key, value in empty_optimizer_tensors(other_named, fresh, saved).items():
        assert value.dtype == saved[key].dtype
        value.copy_(saved[key])
    for network, kept in ((model, optimizer), (other, fresh)):
        for name, parameter in network.named_parameters():
            parameter.grad = torch.full_like(parameter, 0.1 + len(name))
        kept.step()
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


def test_8bit_states_and_sharded_parameters_are_refused_together():
    with pytest.raises(ConfigError, match="AdamW8bit.*parallel.plan=fsdp2"):
        TrainerConfig(
            run_dir="r", total_steps=1, optim=OptimConfig(optimizer="AdamW8bit"), parallel=ParallelConfig(plan="fsdp2")
        )
