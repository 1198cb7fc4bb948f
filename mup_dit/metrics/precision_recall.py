"""Improved precision and recall of a set of samples against a set of references, block by block.

A set's manifold is the union of balls around its points, each as large as the distance to the k-th nearest other point.

Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991); specification 6, ADM's evaluator.

Dimensions: N, M rows, D features.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import DataError
from common.evaluation.metric import Metric

NEIGHBOURS = 3
ROW_BLOCK, COLUMN_BLOCK = 2048, 8192
HALF_ROWS = 10_000  # of the reference's blocks: where one distance overflows, its whole block is float32


@dataclass(frozen=True)
class PrecisionRecall:
    """``precision``: share of samples inside a reference's ball; ``recall``: share of references inside a sample's."""

    precision: Metric
    recall: Metric


def precision_recall(
    sample_ND: Tensor, reference_MD: Tensor, *, k: int = NEIGHBOURS, half_precision: bool = False
) -> PrecisionRecall:
    """Both shares, with binomial standard errors.

    Args:
        half_precision: distances as ADM's evaluator rounds them (float16, or float32 where that overflows); results
            move by some points in a thousand. The default is exact up to float32 rounding of centred features.

    Raises: DataError if a set has k points or fewer, or features are not finite.
    """
    sample_ND, reference_MD = _prepare(sample_ND, reference_MD, half_precision)
    sample_N = radii(sample_ND, k=k, half_precision=half_precision)
    reference_M = radii(reference_MD, k=k, half_precision=half_precision)
    return PrecisionRecall(
        _share("precision", inside(sample_ND, reference_MD, reference_M, half_precision=half_precision)),
        _share("recall", inside(reference_MD, sample_ND, sample_N, half_precision=half_precision)),
    )


def radii(points_ND: Tensor, *, k: int = NEIGHBOURS, half_precision: bool = False) -> Tensor:
    """SQUARED distance of every point to its k-th nearest other point, float32 ``(N,)``.

    Raises: DataError for k points or fewer.
    """
    if len(points_ND) <= k:
        raise DataError(f"{len(points_ND)} images have no {k}-th nearest neighbour; give more than {k}.")
    row_block, column_block = _blocks(half_precision)
    result = []
    for rows in points_ND.split(row_block):
        nearest = None
        for columns in points_ND.split(column_block):
            distance = squared_distances(rows, columns, half_precision=half_precision)
            # the point itself, at distance 0, is one of the k + 1 nearest
            best = distance.topk(min(k + 1, distance.shape[1]), dim=1, largest=False).values
            nearest = best if nearest is None else torch.cat([nearest, best], dim=1)
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), dim=1, largest=False).values
        result.append(nearest.amax(dim=1))
    return torch.cat(result)


def inside(points_ND: Tensor, centres_MD: Tensor, radius_M: Tensor, *, half_precision: bool = False) -> Tensor:
    """Whether each point lies in some ball, bool ``(N,)``; the border belongs to the ball."""
    row_block, column_block = _blocks(half_precision)
    result = []
    for rows in points_ND.split(row_block):
        found = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for columns, radius in zip(centres_MD.split(column_block), radius_M.split(column_block), strict=True):
            found |= (squared_distances(rows, columns, half_precision=half_precision) <= radius).any(dim=1)
        result.append(found)
    return torch.cat(result)


def squared_distances(rows_ND: Tensor, columns_MD: Tensor, *, half_precision: bool = False) -> Tensor:
    """float32 ``(N, M)``; never negative."""
    if half_precision:
        distance = _expanded(rows_ND.half(), columns_MD.half())
        if torch.isfinite(distance).all():
            return distance.float()
    return _expanded(rows_ND, columns_MD).float()


def _expanded(rows_ND: Tensor, columns_MD: Tensor) -> Tensor:
    """|a|^2 - 2 a.b + |b|^2: a matrix product instead of N x M differences."""
    rows_N1 = rows_ND.square().sum(dim=1, keepdim=True)
    columns_1M = columns_MD.square().sum(dim=1)
    return (rows_N1 - 2 * (rows_ND @ columns_MD.T) + columns_1M).clamp(min=0)


def _blocks(half_precision: bool) -> tuple[int, int]:
    return (HALF_ROWS, HALF_ROWS) if half_precision else (ROW_BLOCK, COLUMN_BLOCK)


def _prepare(sample_ND: Tensor, reference_MD: Tensor, half_precision: bool) -> tuple[Tensor, Tensor]:
    for name, points in (("samples", sample_ND), ("reference", reference_MD)):
        if not torch.isfinite(points).all():
            raise DataError(f"some features of the {name} are not finite; check the images and the weights.")
    if half_precision:
        return sample_ND.float(), reference_MD.float()
    # distances stay, and expanding the square loses no digits to a common offset
    centre_D = reference_MD.double().mean(dim=0)
    return tuple((points.double() - centre_D).float() for points in (sample_ND, reference_MD))


def _share(name: str, inside_N: Tensor) -> Metric:
    count = len(inside_N)
    share = float(inside_N.double().mean())
    return Metric(name, share, math.sqrt(share * (1 - share) / count))
