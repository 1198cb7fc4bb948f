"""Similarity of errors: its limits, groups of one, standard errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from rpg.novelty import compute_novelty, iou_matrix, largest_iou, pairwise_metric, wrong_predictions


def random_errors(networks: int, samples: int = 40, share: float = 0.3, seed: int = 0) -> torch.Tensor:
    return torch.rand(networks, samples, generator=torch.Generator().manual_seed(seed)) < share


@given(st.integers(1, 5), st.integers(1, 30), st.floats(0, 1), st.integers(0, 99))
def test_iou_is_a_symmetric_similarity_without_nan(networks, samples, share, seed):
    wrong_KN = random_errors(networks, samples, share, seed)
    iou_KK = iou_matrix(wrong_KN)
    assert iou_KK.isfinite().all() and (iou_KK >= 0).all() and (iou_KK <= 1).all()
    assert torch.equal(iou_KK, iou_KK.T)
    assert torch.equal(iou_KK.diagonal(), wrong_KN.any(1).double())  # 1 with itself, 0 without any error
    for i in range(networks):
        for j in range(networks):
            union = (wrong_KN[i] | wrong_KN[j]).sum()
            expected = float((wrong_KN[i] & wrong_KN[j]).sum() / union) if union else 0.0
            assert float(iou_KK[i, j]) == pytest.approx(expected)


def test_two_perfect_networks_have_similarity_zero():
    novelty = compute_novelty(
        {"original": torch.zeros(2, 5, dtype=torch.bool), "generated": torch.zeros(2, 5, dtype=torch.bool)}
    )
    assert not novelty.iou_KK.any()
    summary = novelty.groups["generated"]
    assert summary.accuracy.value == 1 and summary.similarity.value == 0 and summary.within.value == 0


def test_groups_of_one_have_notes_instead_of_nan():
    wrong_KN = random_errors(2)
    novelty = compute_novelty({"original": wrong_KN[:1], "generated": wrong_KN[1:], "empty": wrong_KN[:0]})
    assert novelty.groups.keys() == {"original", "generated"}
    for summary in novelty.groups.values():
        assert summary.within is None and summary.accuracy.standard_error is None
        assert "one network" in summary.notes[0]
        assert math.isfinite(summary.accuracy.value)
    assert novelty.groups["original"].similarity is None  # there is no other original
    assert math.isfinite(novelty.groups["generated"].similarity.value)


def test_without_originals_groups_are_still_summarised():
    summary = compute_novelty({"generated": random_errors(3)}).groups["generated"]
    assert summary.similarity is None and summary.within is not None
    assert summary.notes == ("no originals to compare with",)


def test_an_original_is_not_compared_with_itself():
    wrong_KN = random_errors(4)
    iou_KK = iou_matrix(wrong_KN)
    expected_K = torch.stack([iou_KK[k, [j for j in range(4) if j != k]].max() for k in range(4)])
    assert torch.equal(largest_iou(iou_KK, same_group=True), expected_K)
    assert torch.equal(largest_iou(iou_KK), wrong_KN.any(1).double())
    copy = compute_novelty({"original": wrong_KN, "generated": wrong_KN[1:2]}).groups["generated"]
    assert copy.similarity.value == 1


def test_the_error_of_mean_similarity_is_the_jackknife_over_networks():
    iou_KK = iou_matrix(random_errors(6))
    metric = pairwise_metric("iou", iou_KK)
    left_out = []
    for k in range(6):
        rest = [j for j in range(6) if j != k]
        part = iou_KK[rest][:, rest]
        left_out.append(float((part.sum() - part.diagonal().sum()) / 20))
    mean = sum(left_out) / 6
    expected = math.sqrt(5 / 6 * sum((value - mean) ** 2 for value in left_out))
    assert metric.standard_error == pytest.approx(expected)
    assert pairwise_metric("iou", iou_KK[:2, :2]).standard_error is None


def test_groups_tested_on_other_samples_are_refused():
    with pytest.raises(DataError, match=r"original.*40.*generated.*30"):
        compute_novelty({"original": random_errors(2), "generated": random_errors(2, 30)})
    with pytest.raises(DataError, match="predictions of shape"):
        wrong_predictions(torch.zeros(2, 5), torch.zeros(4))
