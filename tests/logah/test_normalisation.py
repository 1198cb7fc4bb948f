"""The scale of decoded parameters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logah.normalisation import fan_in_scale, normalise


@pytest.mark.parametrize(
    "shape, square",
    [
        ((8, 50), 2 / 50),
        ((8, 4, 3, 3), 2 / 36),
        ((8, 1, 3, 3), 1 / 9),
        ((8, 4, 3, 5), 1 / 60),
        ((8, 4, 5, 3), 2 / 60),
        ((1, 65, 16), 1.0),
        ((1, 16, 14, 14), 1.0),
        ((1, 16, 8, 8), 2 / 1024),
    ],
)
def test_fan_in_scale(shape: tuple, square: float):
    assert fan_in_scale(shape) == pytest.approx(square**0.5)


@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 30), length=st.integers(1, 50))
def test_vectors_stay_within_their_ranges(seed: int, scale: float, length: int):
    p = scale * torch.randn(length, generator=torch.Generator().manual_seed(seed))
    for rule in ("fan_in", "unit_std"):
        weight, bias = normalise(p, rule), normalise(p, rule, is_weight=False)
        assert ((weight >= 0) & (weight <= 2)).all() and ((bias >= -1) & (bias <= 1)).all()
    assert torch.equal(normalise(torch.zeros(3), "fan_in"), torch.ones(3))
    assert torch.equal(normalise(p, "none"), p)


@given(rows=st.integers(2, 20), columns=st.integers(2, 20), wanted=st.sampled_from([0.02, 0.5]))
def test_unit_std_gives_the_networks_own_deviation(rows: int, columns: int, wanted: float):
    p = 3 + 7 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    assert normalise(p, "unit_std", initializer_range=wanted).std() == pytest.approx(wanted, abs=1e-4 * wanted)


def test_constant_tensors_do_not_divide_by_zero():
    assert torch.isfinite(normalise(torch.zeros(4, 4), "unit_std")).all()
