"""Streaming moments against numpy, and what they keep in memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from mup_dit.metrics import moments
from mup_dit.metrics.moments import MomentAccumulator, compute_moments, read_statistics


def rows(count: int, size: int = 6, offset: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(count).normal(size=(count, size)) + offset).astype(np.float32)


def feed(accumulator: MomentAccumulator, features: np.ndarray, batch: int) -> MomentAccumulator:
    for start in range(0, len(features), batch):
        accumulator.update(features[start : start + batch])
    return accumulator


@given(count=st.integers(2, 60), batch=st.integers(1, 70), block=st.integers(1, 20))
def test_moments_equal_numpy_s_for_any_batches(count, batch, block):
    features = rows(count, offset=5.0)
    before, moments.BLOCK = moments.BLOCK, block
    try:
        found = feed(MomentAccumulator(), features, batch).finish()
    finally:
        moments.BLOCK = before
    exact = features.astype(np.float64)
    np.testing.assert_allclose(found.mean_D, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance_DD, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12)
    assert found.count == count


def test_how_rows_are_batched_does_not_change_a_bit():
    features = rows(3000)
    found = [feed(MomentAccumulator(), features, batch).finish() for batch in (7, 500, 3000)]
    assert all(np.array_equal(each.covariance_DD, found[0].covariance_DD) for each in found)


def test_a_large_mean_costs_no_digits():
    features = rows(500).astype(np.float64)
    shifted = compute_moments(features + 1e6).covariance_DD
    np.testing.assert_allclose(shifted, compute_moments(features).covariance_DD, rtol=1e-6, atol=1e-8)


def test_parts_of_two_processes_merge_into_the_whole():
    features = rows(101, offset=3.0)
    first, second = MomentAccumulator(), MomentAccumulator()
    first.update(features[:40])
    second.update(features[40:])
    empty = MomentAccumulator()
    empty.merge(first)
    empty.merge(second)
    empty.merge(MomentAccumulator())
    whole, found = compute_moments(features), empty.finish()
    np.testing.assert_allclose(found.mean_D, whole.mean_D, rtol=1e-12)
    np.testing.assert_allclose(found.covariance_DD, whole.covariance_DD, rtol=1e-10, atol=1e-13)


def test_memory_does_not_grow_with_the_number_of_images():
    accumulator = MomentAccumulator()
    for _ in range(50):
        accumulator.update(rows(200))
    kept = sum(part.nbytes for part in accumulator._waiting) + accumulator._squares_DD.nbytes
    assert kept <= moments.BLOCK * 6 * 4 + 6 * 6 * 8


def test_too_few_or_infinite_features_are_refused():
    with pytest.raises(DataError, match="1 images"):
        compute_moments(rows(1))
    broken = rows(5)
    broken[2, 3] = np.nan
    with pytest.raises(DataError, match="not finite"):
        compute_moments(broken)


def test_statistics_of_a_file_must_fit_each_other(tmp_path):
    path = tmp_path / "reference.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    assert read_statistics(path, "pool").covariance_DD.shape == (3, 3)
    assert read_statistics(path, "spatial") is None
    np.savez(path, mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(DataError, match="sigma"):
        read_statistics(path, "pool")
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"reference\.npz"):
        read_statistics(path, "pool")
