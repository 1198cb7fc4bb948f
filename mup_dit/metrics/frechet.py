"""Fréchet distance between two Gaussians, the FID of features.

Source: specification 6; ADM's evaluator. The matrix root's trace is computed from eigenvalues instead of a root by
Schur decomposition, so nothing complex arises and no multiple of the identity is added to singular covariances.

Dimensions: D features, K rank.
"""

import numpy as np
import scipy.linalg

from common.errors import DataError
from mup_dit.metrics.moments import Array, Moments

EPS = float(np.finfo(np.float64).eps)
RELATIVE_ERROR = 1e-8  # of the root's trace over the covariances' trace; above it the slow and exact way is taken


def frechet_distance(first: Moments, second: Moments) -> float:
    """|mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)).

    Raises: DataError if the two have different numbers of features.
    """
    if first.mean_D.shape != second.mean_D.shape:
        raise DataError(
            f"the sets have {len(first.mean_D)} and {len(second.mean_D)} features; the reference's statistics were "
            "made with another network."
        )
    difference_D = first.mean_D - second.mean_D
    traces = np.trace(first.covariance_DD) + np.trace(second.covariance_DD)
    root = trace_of_root(first.covariance_DD, second.covariance_DD)
    return float(difference_D @ difference_D + traces - 2.0 * root)


def trace_of_root(first_DD: Array, second_DD: Array) -> float:
    """tr (S_1 S_2)^(1/2) of positive semi-definite matrices, of any rank.

    With S = R R^T, the eigenvalues of S_1 S_2 are those of R_1^T S_2 R_1, and their roots the singular values of
    R_1^T R_2. The eigenvalues take half the time of the singular values, but rounding moves each by about eps times the
    largest, which the root magnifies for small ones. Where the sum of these errors could matter, singular values it is.
    """
    traces = float(np.trace(first_DD) + np.trace(second_DD))
    factor_DK = _factor(first_DD)
    if not factor_DK.size:
        return 0.0
    product_KK = factor_DK.T @ second_DD @ factor_DK
    eigenvalue_K = scipy.linalg.eigvalsh((product_KK + product_KK.T) / 2, driver="evd", check_finite=False)
    noise = 4 * EPS * max(eigenvalue_K[-1], 0.0)
    root_K = np.sqrt(np.maximum(eigenvalue_K, 0.0))
    error = float((noise / (2 * np.maximum(root_K, np.sqrt(noise) + np.finfo(float).tiny))).sum())
    if error <= RELATIVE_ERROR * traces:
        return float(root_K.sum())
    cross_KK = factor_DK.T @ _factor(second_DD)
    return float(scipy.linalg.svdvals(cross_KK, overwrite_a=True).sum()) if cross_KK.size else 0.0


def _factor(matrix_DD: Array) -> Array:
    """R with R R^T = S: Cholesky's, or of a singular matrix the scaled eigenvectors of what is above rounding."""
    try:
        return scipy.linalg.cholesky(matrix_DD, lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        value_D, vector_DD = scipy.linalg.eigh(matrix_DD, check_finite=False)
        kept = value_D > len(value_D) * EPS * max(value_D[-1], 0.0)
        return vector_DD[:, kept] * np.sqrt(value_D[kept])
