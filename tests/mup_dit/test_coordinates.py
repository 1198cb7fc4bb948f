"""The coordinate check: what is recorded, how slopes are judged, and that it tells muP from the rest."""

import math

import pytest
import torch
from torch import nn

from mup_dit.building import build_model
from mup_dit.coordinates import Coordinate, coordinates, judge, recording, slopes
from mup_dit.optimizer_groups import mup_groups
from tests.mup_dit.tiny import inputs, model_config


class TwoOutputs(nn.Module):
    def forward(self, x):
        return x, 3 * x


def test_every_module_is_recorded_once_in_order_of_completion():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU()))
    with recording(model, ("l1", "l2")) as records:
        out = model(torch.ones(4, 2))
    assert [record["module"] for record in records] == ["0", "1.0", "1", ""]
    assert records[-1]["l1"] == pytest.approx(out.abs().mean().item())
    assert records[-1]["l2"] == pytest.approx(out.square().mean().sqrt().item())
    model(torch.ones(4, 2))
    assert len(records) == 4  # the hooks are gone


def test_tuples_give_one_record_each():
    model = TwoOutputs()
    with recording(model) as records:
        model(torch.full((2,), 2.0))
    assert [(r["module"], r["l1"]) for r in records] == [(":out[0]", 2.0), (":out[1]", 6.0)]


def synthetic(exponent: float, widths=(16, 32, 64, 128), module: str = "m") -> list[Coordinate]:
    return [Coordinate(0, width, 1, module, 3.0 * width**exponent) for width in widths]


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 0.2, 1.0])
def test_slope_is_the_exponent(exponent):
    (slope,) = slopes(synthetic(exponent))
    assert slope.slope == pytest.approx(exponent, abs=1e-9)
    assert judge(synthetic(exponent)).passed == (abs(exponent) <= 0.25)


def test_zero_outputs_have_no_slope_and_nothing_measurable_is_no_pass():
    zeros = [Coordinate(0, width, 1, "readout", 0.0) for width in (16, 32)]
    assert slopes(zeros) == []
    assert not judge(zeros).passed
    assert judge(zeros + synthetic(0.1)).passed


def test_a_diverged_network_does_not_pass():
    found = synthetic(0.0) + [Coordinate(0, 256, 1, "m", math.nan)]
    assert judge(found).steepest.slope == math.inf
    assert not judge(found).passed


def test_seeds_are_averaged_before_the_fit():
    found = [Coordinate(seed, width, 1, "m", 1.0 + seed) for seed in (0, 1, 2) for width in (16, 64)]
    assert slopes(found)[0].slope == pytest.approx(0.0, abs=1e-12)


def check(family: str, parametrization: str, scaled: bool = True):
    """Verdict of 3 steps on random data; three widths."""

    def prepare(heads: int, seed: int):
        rng = torch.Generator().manual_seed(seed)
        network = build_model(model_config(family, heads, parametrization), rng)
        groups = mup_groups(network.named_parameters(), network.scalings if scaled else None, 0.0)
        optimizer = torch.optim.AdamW(
            [{"params": g["params"], "lr": 2**-7 * g["lr_scale"], "weight_decay": 0.0} for g in groups]
        )
        arguments = inputs(family, rows=16)

        def step() -> None:
            (network(*arguments) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return network, step

    widths = {heads: 8 * heads for heads in (2, 4, 8, 16)}
    return judge(coordinates(prepare, widths, steps=3, seeds=[0, 1]))


@pytest.mark.parametrize("family", ["dit", "pixart", "mmdit"])
def test_mup_passes(family):
    verdict = check(family, "mup")
    assert verdict.passed, verdict.steepest


@pytest.mark.parametrize("parametrization", ["sp", "mup_init"])
def test_other_parametrisations_fail(parametrization):
    verdict = check("dit", parametrization)
    assert not verdict.passed, verdict.steepest
