"""How different the layers of one network are: predicted weights that repeat each other waste its width and depth.

All weights of one shape are compared in pairs, each pair after the rows of one have been matched to those of the
other, because the order of a layer's neurons means nothing.

Source: diversity analysis of GHN-3 (Knyazev et al., 2023), kept by LoGAH's code.

Dimensions: K layers of a shape, R rows, C columns.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import DataError

SHAPES = ((384, 384), (1536, 384))
"""Compared in the published analysis: projections and MLPs of ViT-S."""

TINY = 1e-12


@dataclass(frozen=True)
class Diversity:
    """Layers of one shape.

    Attributes:
        distance_KK: cosine distance of each pair after matching; about 0 on the diagonal.
        mean: of ``|distance_KK|`` over the whole matrix, diagonal included, as published.
        mean_of_pairs: over pairs of different layers.
        standard_error: of ``mean_of_pairs``, from leaving out one layer at a time; NaN below three layers.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    distance_KK: NDArray[np.float64]

    @property
    def mean(self) -> float:
        return float(np.abs(self.distance_KK).mean())

    @property
    def mean_of_pairs(self) -> float:
        return _mean_of_pairs(self.distance_KK)

    @property
    def standard_error(self) -> float:
        count = len(self.names)
        if count < 3:
            return float("nan")
        kept = [np.delete(np.arange(count), left_out) for left_out in range(count)]
        means = np.array([_mean_of_pairs(self.distance_KK[np.ix_(rest, rest)]) for rest in kept])
        return float(np.sqrt((count - 1) / count * ((means - means.mean()) ** 2).sum()))


def matched_distance(a_RC: Tensor, b_RC: Tensor) -> float:
    """Cosine distance of two matrices once each row of ``b_RC`` stands where it fits ``a_RC`` best.

    The matching minimises the sum of absolute cosine distances of rows (Hungarian algorithm).
    """
    from scipy.optimize import linear_sum_assignment

    a_RC, b_RC = a_RC.double(), b_RC.double()
    cosine_RR = _unit_rows(a_RC) @ _unit_rows(b_RC).T
    rows, partners = linear_sum_assignment((1 - cosine_RR).abs().numpy())
    a, b = a_RC[rows].reshape(-1), b_RC[torch.as_tensor(partners)].reshape(-1)
    return float(1 - a @ b / (a.norm() * b.norm()).clamp_min(TINY))


def layer_diversity(layers: Mapping[str, Tensor]) -> Diversity:
    """Distances between all layers of ``layers``, which have one shape; a kernel counts as a row per output.

    Raises: DataError for fewer than two layers or for different shapes.
    """
    shapes = {tuple(layer.shape) for layer in layers.values()}
    if len(layers) < 2 or len(shapes) != 1:
        raise DataError(f"layers to compare: {len(layers)} of shapes {sorted(shapes)}; two or more of one are needed.")
    matrices = [layer.detach().reshape(layer.shape[0], -1).float() for layer in layers.values()]
    distance_KK = np.zeros((len(matrices), len(matrices)))
    for i, a_RC in enumerate(matrices):
        for j in range(i, len(matrices)):
            distance_KK[i, j] = distance_KK[j, i] = matched_distance(a_RC, matrices[j])
    return Diversity(shapes.pop(), tuple(layers), distance_KK)


def network_diversity(
    state: Mapping[str, Tensor], shapes: Sequence[Sequence[int]] | None = None, *, most_rows: int = 4096
) -> list[Diversity]:
    """``layer_diversity`` of every shape that two weights or more of a network have, smallest shape first.

    Args:
        shapes: only these; None: all with two dimensions or more and at most ``most_rows`` rows (the matching takes
            time with the cube of the rows).

    Raises: DataError if nothing can be compared, with the shapes that could.
    """
    groups: dict[tuple[int, ...], dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in state.items():
        if tensor.dim() >= 2 and tensor.is_floating_point() and min(tensor.shape[0], tensor[0].numel()) > 1:
            groups[tuple(tensor.shape)][name] = tensor
    groups = {shape: layers for shape, layers in groups.items() if len(layers) > 1}
    if shapes is None:
        chosen = [shape for shape in groups if shape[0] <= most_rows]
    else:
        chosen = [shape for shape in map(tuple, shapes) if shape in groups]
    if not chosen:
        there = ", ".join(f"{list(shape)} ({len(layers)} layers)" for shape, layers in sorted(groups.items())) or "none"
        raise DataError(f"shapes={shapes}: no two weights have one of these shapes; shapes in this network: {there}.")
    return [layer_diversity(groups[shape]) for shape in sorted(chosen)]


def _unit_rows(x_RC: Tensor) -> Tensor:
    return x_RC / x_RC.norm(dim=1, keepdim=True).clamp_min(TINY)


def _mean_of_pairs(distance_KK: NDArray[np.float64]) -> float:
    upper = np.triu_indices(len(distance_KK), 1)
    return float(np.abs(distance_KK[upper]).mean())
