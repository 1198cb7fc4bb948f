"""Precision and recall against distances in full, block by block, and their symmetry."""

import pytest
import torch

from common.errors import DataError
from mup_dit.metrics import precision_recall as module
from mup_dit.metrics.precision_recall import inside, precision_recall, radii


def points(count: int, seed: int, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)) + offset


def direct(sample: torch.Tensor, reference: torch.Tensor, k: int) -> tuple[float, float]:
    sample, reference = sample.double(), reference.double()
    ball = {}
    for name, each in (("sample", sample), ("reference", reference)):
        ball[name] = torch.cdist(each, each).sort(dim=1).values[:, k]
    between = torch.cdist(sample, reference)
    return (
        float((between <= ball["reference"]).any(dim=1).double().mean()),
        float((ball["sample"] >= between.T).any(dim=1).double().mean()),
    )


@pytest.mark.parametrize("blocks", [(2048, 8192), (7, 11)])
def test_shares_equal_those_of_all_distances_at_once(blocks, monkeypatch):
    monkeypatch.setattr(module, "ROW_BLOCK", blocks[0])
    monkeypatch.setattr(module, "COLUMN_BLOCK", blocks[1])
    sample, reference = points(60, 0, 0.7), points(50, 1)
    found = precision_recall(sample, reference)
    assert (found.precision.value, found.recall.value) == pytest.approx(direct(sample, reference, 3))


def test_swapping_the_sets_swaps_precision_and_recall():
    sample, reference = points(60, 0, 0.7), points(50, 1)
    found, swapped = precision_recall(sample, reference), precision_recall(reference, sample)
    assert found.precision.value == swapped.recall.value != found.recall.value == swapped.precision.value


def test_a_common_offset_costs_no_digits():
    sample, reference = points(60, 0, 0.7).double(), points(50, 1).double()
    near, far = precision_recall(sample, reference), precision_recall(sample + 1e4, reference + 1e4)
    assert (near.precision.value, near.recall.value) == (far.precision.value, far.recall.value)


def test_points_on_the_border_are_inside():
    centres = torch.tensor([[0.0, 0.0]])
    rows = torch.tensor([[3.0, 4.0], [3.0, 4.1]])
    assert inside(rows, centres, torch.tensor([25.0])).tolist() == [True, False]


def test_half_precision_falls_back_where_distances_overflow():
    sample = 1000 * points(20, 2)
    assert torch.equal(radii(sample, half_precision=True), radii(sample))


def test_too_few_points_and_infinite_features_are_refused():
    with pytest.raises(DataError, match="3 images"):
        precision_recall(points(3, 0), points(20, 1))
    broken = points(20, 0)
    broken[0, 0] = torch.inf
    with pytest.raises(DataError, match="samples are not finite"):
        precision_recall(broken, points(20, 1))
