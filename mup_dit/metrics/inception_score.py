"""Inception Score over consecutive splits, in one pass.

Dimensions: B rows, K classes.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.evaluation.metric import Metric, mean_metric

SPLIT_SIZE = 5000


class ScoreAccumulator:
    """exp of the mean KL(p(y|x) || p(y)) in every split of ``split_size`` consecutive images, averaged over splits.

    Of a split only sum p and sum p log p are kept. The last split may be shorter.

    Source: specification 6; ADM's evaluator, which does not shuffle.
    """

    def __init__(self, split_size: int = SPLIT_SIZE) -> None:
        self.split_size = split_size
        self._splits: dict[int, tuple[int, NDArray, float]] = {}  # count, sum of p, sum of p log p

    def update(self, logits_BK: NDArray, indices: Sequence[int]) -> None:
        """Adds the rows of images with these numbers within the set."""
        log_p_BK = np.asarray(logits_BK, np.float64)
        log_p_BK = log_p_BK - log_p_BK.max(axis=1, keepdims=True)
        log_p_BK -= np.log(np.exp(log_p_BK).sum(axis=1, keepdims=True))
        p_BK = np.exp(log_p_BK)
        entropy_B = (p_BK * log_p_BK).sum(axis=1)
        split_B = np.asarray(indices) // self.split_size
        for split in np.unique(split_B):
            rows = split_B == split
            self._add(int(split), int(rows.sum()), p_BK[rows].sum(axis=0), float(entropy_B[rows].sum()))

    def merge(self, other: "ScoreAccumulator") -> None:
        """Adds another process's rows."""
        for split, sums in other._splits.items():
            self._add(split, *sums)

    def _add(self, split: int, count: int, p_K: NDArray, entropy: float) -> None:
        before = self._splits.get(split, (0, 0.0, 0.0))
        self._splits[split] = before[0] + count, before[1] + p_K, before[2] + entropy

    def finish(self, name: str = "inception_score") -> Metric:
        """The mean over splits; its standard error over splits, None for a single one.

        Raises: DataError without images or for values that are not finite.
        """
        if not self._splits:
            raise DataError("there are no images to score.")
        scores = []
        for _, (count, p_K, entropy) in sorted(self._splits.items()):
            mean_K = p_K / count
            marginal = float((mean_K * np.log(np.where(mean_K > 0, mean_K, 1.0))).sum())
            scores.append(float(np.exp(entropy / count - marginal)))
        if not np.isfinite(scores).all():
            raise DataError("some class scores are not finite; check the images and the network's weights.")
        return mean_metric(name, scores)
