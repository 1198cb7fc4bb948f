"""Fréchet distance against a matrix root, for singular covariances, and of a set with itself."""

import numpy as np
import pytest
import scipy.linalg

from common.errors import DataError
from mup_dit.metrics.frechet import frechet_distance, trace_of_root
from mup_dit.metrics.moments import Moments, compute_moments


def moments(count: int, size: int, seed: int, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(size, size)) * np.logspace(0, -3, size)
    return compute_moments(scale * rng.normal(size=(count, size)) @ mixing + rng.normal(size=size))


def test_distance_equals_that_of_a_matrix_root():
    first, second = moments(200, 10, 0), moments(300, 10, 1)
    root = scipy.linalg.sqrtm(first.covariance_DD @ second.covariance_DD)
    expected = np.sum((first.mean_D - second.mean_D) ** 2) + np.trace(
        first.covariance_DD + second.covariance_DD - 2 * root.real
    )
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("count", [200, 30, 5])
def test_a_set_is_at_distance_zero_of_itself_whatever_its_rank(count):
    found = moments(count, 64, 2)
    scale = np.trace(found.covariance_DD)
    assert abs(frechet_distance(found, found)) < 1e-6 * scale


def test_singular_covariances_are_no_obstacle():
    few, many = moments(4, 20, 3), moments(500, 20, 4)
    distance = frechet_distance(few, many)
    jitter = Moments(few.mean_D, few.covariance_DD + 1e-12 * np.eye(20))
    assert np.isfinite(distance)
    assert distance == pytest.approx(frechet_distance(jitter, many), rel=1e-4)
    zero = np.zeros((20, 20))
    assert trace_of_root(zero, many.covariance_DD) == trace_of_root(many.covariance_DD, zero) == 0


def test_sets_of_different_networks_are_refused():
    with pytest.raises(DataError, match="another network"):
        frechet_distance(moments(9, 3, 0), moments(9, 4, 0))
