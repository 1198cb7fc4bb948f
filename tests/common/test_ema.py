"""The moving average follows the reference and can take the parameters' place for a while."""

import pytest
import torch
from torch import nn

from common.ema import EMA
from common.errors import CheckpointError
from common.testing.golden import load_cases


def test_shadow_follows_the_reference():
    case = load_cases("radd")["ema"]
    parameter = nn.Parameter(torch.from_numpy(case.arrays["in_init"]).clone())
    ema = EMA({"w": parameter}, case.config["decay"])
    shadows = []
    for value in case.arrays["in_values"]:
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(value))
        ema.update()
        shadows.append(ema.shadow["w"].clone())
    case.check("out_shadow", torch.stack(shadows))


def make() -> tuple[nn.Linear, EMA]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema = EMA(dict(model.named_parameters()), 0.5)
    with torch.no_grad():
        model.weight += 1
    ema.update()
    return model, ema


def test_swap_shows_the_average_and_gives_the_parameters_back():
    model, ema = make()
    raw, average = model.weight.clone(), ema.shadow["weight"].clone()
    model.train()
    with ema.swapped(model):
        assert torch.equal(model.weight, average)
        assert not model.training
    assert torch.equal(model.weight, raw)
    assert torch.equal(ema.shadow["weight"], average)
    assert model.training


def test_swap_is_undone_after_an_error():
    model, ema = make()
    raw = model.weight.clone()
    with pytest.raises(KeyError), ema.swapped():
        raise KeyError
    assert torch.equal(model.weight, raw)


def test_average_cannot_be_saved_or_updated_while_swapped():
    _, ema = make()
    for act in (ema.update, ema.state_dict):
        with pytest.raises(AssertionError), ema.swapped():
            act()


def test_saved_average_continues_as_if_never_stopped():
    model, ema = make()
    other = EMA(dict(model.named_parameters()), 0.5)
    saved = ema.state_dict()
    other.load_state_dict({**saved, "shadow": {k: v.clone() for k, v in saved["shadow"].items()}})
    for average in (ema, other):
        average.update()
    assert torch.equal(ema.shadow["weight"], other.shadow["weight"])
    assert ema.num_updates == other.num_updates == 2


def test_average_of_another_model_is_refused():
    _, ema = make()
    with pytest.raises(CheckpointError, match="bias"):
        ema.load_state_dict({"num_updates": 1, "shadow": {"weight": torch.zeros(2, 3)}})
    with pytest.raises(CheckpointError, match=r"weight: shape \(1, 3\)"):
        ema.load_state_dict({"num_updates": 1, "shadow": {"weight": torch.zeros(1, 3), "bias": torch.zeros(2)}})
