"""Which number format a run gets, and the loss scale of float16."""

import pytest
import torch
from torch import nn

from common import precision
from common.errors import ConfigError
from common.precision import LossScaler, autocast_forward, resolve_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    "device, native, plan, expected",
    [(CPU, True, "none", "bf16"), (CPU, False, "none", "fp32"), (GPU, True, "ddp", "bf16"),
     (GPU, False, "fsdp2", "fp16"), (GPU, False, "zero2", "fp32")],
)  # fmt: skip
def test_auto_follows_the_hardware(monkeypatch, device: torch.device, native: bool, plan: str, expected: str):
    monkeypatch.setattr(precision, "has_native_bf16", lambda _: native)
    assert resolve_precision("auto", device, plan) == expected


def test_loss_scaling_under_deepspeed_is_refused():
    with pytest.raises(ConfigError, match="precision=fp16 does not work with parallel.plan=zero2"):
        resolve_precision("fp16", CPU, "zero2")


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_forward_runs_in_the_chosen_format_over_float32_parameters(name: str, dtype: torch.dtype):
    model = nn.Linear(2, 2)
    autocast_forward(model, name, CPU)
    assert model(torch.zeros(1, 2)).dtype == dtype
    assert model.weight.dtype == torch.float32
    assert (model.weight @ model.weight).dtype == torch.float32  # outside the module nothing is cast


def test_scale_halves_on_overflow_and_doubles_after_a_sound_stretch():
    scaler = LossScaler(True, scale=8.0, growth_interval=2)
    scaler.update(False)
    assert scaler.scale == 4.0
    scaler.update(True)
    other = LossScaler(True, growth_interval=2)
    other.load_state_dict(scaler.state_dict())
    for each in (scaler, other):
        each.update(True)
    assert scaler.scale == other.scale == 8.0


def test_scale_has_a_floor_and_is_one_when_disabled():
    scaler = LossScaler(True, scale=1.0)
    scaler.update(False)
    assert scaler.scale == 1.0
    assert not scaler.can_shrink
    assert LossScaler(False).scale == 1.0
