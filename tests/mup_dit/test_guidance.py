"""Guidance: which channels, where in the process, against what; always one call of twice the rows."""

import pytest
import torch
from torch import nn

from common.errors import ConfigError
from mup_dit.guidance import Guidance, GuidedDenoiser
from mup_dit.sampling import caption_condition, label_condition
from tests.mup_dit.tiny import inputs, model


class Recorder(nn.Module):
    """Returns its label in every channel and notes its calls."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.channels, self.calls = channels, []

    def forward(self, x, t_B, y_B):
        self.calls.append((len(x), float(t_B[0]), t_B.dtype))
        return y_B.float().reshape(-1, 1, 1, 1).expand(-1, self.channels, *x.shape[2:])


def guided(guidance: Guidance, weak=None):
    network = Recorder()
    condition, null = {"y_B": torch.tensor([1, 2, 3])}, {"y_B": torch.tensor([10, 10, 10])}
    return network, GuidedDenoiser(network, condition, null, guidance, last_time=999.0, weak=weak)


X = torch.zeros(3, 4, 2, 2)


@pytest.mark.parametrize(("channels", "count"), [("three", 3), ("all", 4)])
def test_guided_channels(channels, count):
    network, denoise = guided(Guidance(scale=3.0, channels=channels))
    out = denoise(X, 500)
    assert torch.allclose(out[:, :count], torch.tensor([-17.0, -14.0, -11.0]).reshape(3, 1, 1, 1))
    assert torch.equal(out[:, count:, 0, 0], torch.tensor([[1.0], [2.0], [3.0]]).expand(3, 8 - count))
    assert network.calls == [(6, 500.0, torch.float32)]


def test_scale_one_is_one_conditional_call():
    network, denoise = guided(Guidance())
    assert torch.equal(denoise(X, 0)[:, 0, 0, 0], torch.tensor([1.0, 2.0, 3.0]))
    assert network.calls == [(3, 0.0, torch.float32)]
    assert denoise.evaluations == 1


def test_outside_its_interval_guidance_costs_nothing():
    network, denoise = guided(Guidance(scale=2.0, start=0.2, end=0.6))
    for time in (999, 500, 100):
        denoise(X, time)
    assert [rows for rows, *_ in network.calls] == [3, 6, 3]
    assert denoise.evaluations == 4


def test_a_weak_model_takes_the_place_of_the_null_condition():
    weak = Recorder()
    weak.forward = lambda x, t_B, y_B: torch.zeros(len(x), 8, 2, 2)
    network, denoise = guided(Guidance(scale=2.0, channels="all"), weak=weak)
    assert torch.equal(denoise(X, 500)[:, 0, 0, 0], torch.tensor([2.0, 4.0, 6.0]))
    assert network.calls == [(3, 500.0, torch.float32)]


@pytest.mark.parametrize("family", ["dit", "pixart", "mmdit"])
def test_guidance_equals_the_networks_own(family):
    network = model(family).eval()
    arguments = inputs(family, rows=3)
    x, condition = arguments[0], arguments[2:]
    time = 0.4 if family == "mmdit" else 400.0
    t_2B = torch.full((6,), time)
    double = torch.cat([x, x])
    with torch.no_grad():
        if family == "dit":
            conditions = label_condition(network, condition[0].tolist(), x.device)
            y = torch.cat([condition[0], torch.full((3,), 10)])
            expected = network.forward_with_cfg(double, t_2B, y, 2.5)[:3]
        elif family == "pixart":
            mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6, [1, 0, 0, 0, 0, 0]])
            conditions = caption_condition(network, family, condition[0], mask)
            null = network.y_embedder.y_embedding.expand(3, 1, -1, -1)
            y = torch.cat([condition[0], null])
            expected = network.forward_with_cfg(double, t_2B, y, 2.5, mask)[:3]
        else:
            conditions = caption_condition(network, family, condition[0][:, None], None, condition[1])
            pair = [torch.cat([values, torch.zeros_like(values)]) for values in condition]
            expected = network.forward_with_cfg(double, t_2B, *pair, 2.5, channels="three")[:3]
        last = 1.0 if family == "mmdit" else 999.0
        found = GuidedDenoiser(network, *conditions, Guidance(scale=2.5), last_time=last)(x, time)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.5}, "below 1"),
        ({"scale": float("nan")}, "below 1"),
        ({"channels": "two"}, "three, all"),
        ({"start": 0.8, "end": 0.2}, "cfg_interval"),
    ],
)
def test_impossible_guidance_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Guidance(**options)


def test_labels_outside_the_table_are_refused():
    network = model("dit")
    with pytest.raises(ConfigError, match="label 11"):
        label_condition(network, [3, 11], torch.device("cpu"))
    assert label_condition(network, [3, 10], torch.device("cpu"))[0]["y_B"].tolist() == [3, 10]
    without = model("dit", class_dropout_prob=0.0)
    with pytest.raises(ConfigError, match="label 10"):
        label_condition(without, [10], torch.device("cpu"))
    assert label_condition(without, [9], torch.device("cpu"))[1] == {}
