"""Mean and covariance of features in one pass, in float64 and in memory that does not grow with their number.

Dimensions: N rows, D features.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import dsyrk

from common.errors import DataError

BLOCK = 1024  # rows per update of the matrix
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """What a Fréchet distance needs of a set.

    Attributes:
        mean_D: float64.
        covariance_DD: float64, divided by N - 1.
        count: N; None where a file of statistics does not say.
    """

    mean_D: Array
    covariance_DD: Array
    count: int | None = None


class MomentAccumulator:
    """Moments of rows that arrive in batches of any size.

    Rows wait until a block is full, so the result does not depend on how they are batched. Sums are of differences
    from the first block's mean: their squares lose no digits to a large mean.
    """

    def __init__(self) -> None:
        self.count = 0  # rows in the sums; those that wait are not in it
        self._shift_D: Array | None = None
        self._sum_D: Array | None = None
        self._squares_DD: Array | None = None  # lower triangle, column-major, as BLAS updates it in place
        self._waiting: list[NDArray] = []
        self._num_waiting = 0

    @property
    def is_empty(self) -> bool:
        """Whether no row has come yet."""
        return not self.count and not self._num_waiting

    def update(self, features_ND: NDArray) -> None:
        """Adds rows, in any real dtype."""
        start = 0
        while start < len(features_ND):
            part = features_ND[start : start + BLOCK - self._num_waiting]
            self._waiting.append(np.array(part))  # a copy: the caller may reuse its buffer
            self._num_waiting += len(part)
            start += len(part)
            if self._num_waiting == BLOCK:
                self._flush()

    def merge(self, other: "MomentAccumulator") -> None:
        """Adds another process's rows; ``other`` is left unchanged in value."""
        other._flush()
        self._flush()
        if not other.count:
            return
        if not self.count:
            self.count, self._shift_D = other.count, other._shift_D.copy()
            self._sum_D, self._squares_DD = other._sum_D.copy(), other._squares_DD.copy(order="F")
            return
        # move the other's sums to this shift
        offset_D = other._shift_D - self._shift_D
        cross_DD = np.outer(other._sum_D, offset_D)
        self._squares_DD += other._squares_DD + np.tril(
            cross_DD + cross_DD.T + other.count * np.outer(offset_D, offset_D)
        )
        self._sum_D += other._sum_D + other.count * offset_D
        self.count += other.count

    def finish(self) -> Moments:
        """The moments of all rows so far.

        Raises: DataError for fewer than two rows, or values that are not finite.
        """
        self._flush()
        if self.count < 2:
            raise DataError(f"{self.count} images have no covariance; give at least 2.")
        mean_D = self._sum_D / self.count
        lower_DD = (self._squares_DD - np.tril(self.count * np.outer(mean_D, mean_D))) / (self.count - 1)
        if not (np.isfinite(mean_D).all() and np.isfinite(lower_DD).all()):
            raise DataError("some features are not finite; check the images and the network's weights.")
        covariance_DD = np.ascontiguousarray(lower_DD + np.tril(lower_DD, -1).T)
        return Moments(mean_D + self._shift_D, covariance_DD, self.count)

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows_BD = np.concatenate(self._waiting).astype(np.float64)
        self._waiting, self._num_waiting = [], 0
        if self._shift_D is None:
            size = rows_BD.shape[1]
            self._shift_D, self._sum_D = rows_BD.mean(axis=0), np.zeros(size)
            self._squares_DD = np.zeros((size, size), order="F")
        rows_BD -= self._shift_D
        self.count += len(rows_BD)
        self._sum_D += rows_BD.sum(axis=0)
        # half the work of a full product, because the result is symmetric
        self._squares_DD = dsyrk(1.0, rows_BD.T, beta=1.0, c=self._squares_DD, lower=1, overwrite_c=1)


def compute_moments(features_ND: NDArray) -> Moments:
    """Moments of rows that are all in memory."""
    accumulator = MomentAccumulator()
    accumulator.update(np.asarray(features_ND))
    return accumulator.finish()


STATISTICS_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def read_statistics(path: Path, kind: str) -> Moments | None:
    """Moments stored in an ``.npz`` under ``mu`` and ``sigma`` (pool) or ``mu_s`` and ``sigma_s`` (spatial).

    Returns: None if the file has no such keys.

    Raises: DataError for a file that cannot be read, or whose arrays do not fit each other.
    """
    mean_key, covariance_key = STATISTICS_KEYS[kind]
    try:
        with np.load(path, allow_pickle=False) as stored:
            if not {mean_key, covariance_key} <= set(stored.files):
                return None
            mean_D = stored[mean_key].astype(np.float64)
            covariance_DD = stored[covariance_key].astype(np.float64)
            count = int(stored["count"]) if "count" in stored.files else None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"reference={path} is no .npz that can be read ({error}).") from error
    if mean_D.ndim != 1 or covariance_DD.shape != 2 * mean_D.shape:
        raise DataError(
            f"reference={path}: {mean_key} has shape {mean_D.shape}, {covariance_key} {covariance_DD.shape}; expected "
            "(D,) and (D, D)."
        )
    return Moments(mean_D, covariance_DD, count)
