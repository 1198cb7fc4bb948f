"""How near generated networks come to the originals in weight space: distances, nearest originals, verdict on copies.

All numbers come from one matrix of values per group of networks. Of large networks a random sample of values is taken,
the same positions in each (``ValueSample``), so that fifty checkpoints of 200 million weights fit into memory and every
file is read once; distances are then estimates, to about 1 / sqrt(values) of their size.

Dimensions: K, G networks (originals, generated), A, B networks of any two groups, V values of a network.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import DataError
from common.evaluation.metric import Metric, mean_metric
from common.seeding import generator
from rpg.baselines import is_varying

MEMORY_BYTES = 2 << 30  # for the values of all networks of a comparison
COPY_FACTOR = 3.0
COLUMNS = 1 << 20  # values that are compared at a time in float64


class ValueSample:
    """Which values of a network enter a comparison: all, or a random share of every varying tensor.

    Sampled values are weighted by ``sqrt(size / sampled)`` of their tensor, so that squared norms are unbiased.

    Args:
        state: any of the networks.
        num_networks: how many will be compared; together they may hold ``memory_bytes`` of float32 values.
        seed: chooses the positions.

    Raises: DataError if nothing varies.
    """

    def __init__(
        self, state: Mapping[str, Tensor], num_networks: int, *, memory_bytes: int = MEMORY_BYTES, seed: int = 0
    ) -> None:
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if is_varying(name, tensor)}
        sizes = {name: tensor.numel() for name, tensor in state.items() if name in self.shapes}
        self.num_values = sum(sizes.values())
        if not self.num_values:
            raise DataError("the networks have no floating-point tensor of more than one element; nothing to compare.")
        share = min(1.0, memory_bytes / (4 * max(num_networks, 1) * self.num_values))
        self._positions: dict[str, Tensor | None] = {}
        self.slices: dict[str, slice] = {}
        first = 0
        for place, (name, size) in enumerate(sizes.items()):
            count = size if share == 1 else max(2, round(share * size))
            draw = generator(seed, "compared_values", place)
            self._positions[name] = None if count >= size else torch.randint(size, (count,), generator=draw)
            self.slices[name] = slice(first, first := first + min(count, size))
        self.num_sampled = first
        self._weights = {
            name: 1.0 if positions is None else (sizes[name] / len(positions)) ** 0.5
            for name, positions in self._positions.items()
        }

    @property
    def is_exact(self) -> bool:
        return self.num_sampled == self.num_values

    def values(self, state: Mapping[str, Tensor], name: str = "a network") -> Tensor:
        """(V,) float32, weighted.

        Raises: DataError if a tensor is missing or has another shape, with ``name``.
        """
        found_V = torch.empty(self.num_sampled)
        for key, positions in self._positions.items():
            if key not in state or tuple(state[key].shape) != self.shapes[key]:
                shape = tuple(state[key].shape) if key in state else "missing"
                raise DataError(
                    f"{name}: {key} is {shape}, in the first network {self.shapes[key]}; compare networks of one "
                    "architecture."
                )
            value = state[key].detach().cpu().flatten().float()
            found_V[self.slices[key]] = value if positions is None else value[positions] * self._weights[key]
        return found_V

    def matrix(self, states: Iterable[tuple[str, Mapping[str, Tensor]]], count: int) -> Tensor:
        """(count, V) values of named networks, read one after another."""
        found_KV = torch.empty(count, self.num_sampled)
        for place, (name, state) in enumerate(states):
            found_KV[place] = self.values(state, name)
        return found_KV

    def unweighted(self, values_KV: Tensor, name: str) -> Tensor:
        """The values of one tensor as they are in the network."""
        return values_KV[:, self.slices[name]] / self._weights[name]


def pairwise_distances(values_AV: Tensor, values_BV: Tensor, centre_V: Tensor | None = None) -> Tensor:
    """(A, B) float64 Euclidean distances.

    Computed from scalar products in float64 of values minus a common centre, which keeps the distances of near copies:
    the relative error is about 1e-8 of the largest distance from the centre.
    """
    centre_V = values_BV.mean(0) if centre_V is None else centre_V
    squared_AB = torch.zeros(len(values_AV), len(values_BV), dtype=torch.float64)
    for first in range(0, values_AV.shape[1], COLUMNS):
        part = slice(first, first + COLUMNS)
        a_AV = values_AV[:, part].double() - centre_V[part].double()
        b_BV = values_BV[:, part].double() - centre_V[part].double()
        squared_AB += a_AV.square().sum(1)[:, None] + b_BV.square().sum(1)[None] - 2 * a_AV @ b_BV.T
    return squared_AB.clamp(min=0).sqrt()


@dataclass(frozen=True)
class Nearest:
    """The original that a network is nearest to.

    Attributes:
        distance: Euclidean, over all varying values.
        relative: the distance over the network's own norm.
        cosine: of the two networks' offsets from the mean original: 1 for the same direction, 0 for unrelated ones.
        mean_distance: distance from the mean original.
    """

    name: str
    original: str
    distance: float
    relative: float
    cosine: float
    mean_distance: float


def nearest_originals(
    names: Sequence[str], values_GV: Tensor, original_names: Sequence[str], originals_KV: Tensor
) -> list[Nearest]:
    """For every network the original at the smallest distance."""
    centre_V = originals_KV.mean(0)
    distance_GK = pairwise_distances(values_GV, originals_KV, centre_V)
    from_mean_G = pairwise_distances(values_GV, centre_V[None], centre_V)[:, 0]
    from_mean_K = pairwise_distances(originals_KV, centre_V[None], centre_V)[:, 0]
    norm_G = torch.linalg.vector_norm(values_GV, dim=1, dtype=torch.float64)
    found = []
    for row, name in enumerate(names):
        place = int(distance_GK[row].argmin())
        distance, own, other = distance_GK[row, place], from_mean_G[row], from_mean_K[place]
        product = float((own**2 + other**2 - distance**2) / 2)
        lengths = float(own * other)
        found.append(
            Nearest(
                name=name,
                original=original_names[place],
                distance=float(distance),
                relative=float(distance / norm_G[row].clamp(min=1e-30)),
                cosine=max(-1.0, min(1.0, product / lengths)) if lengths > 0 else 0.0,
                mean_distance=float(own),
            )
        )
    return found


@dataclass(frozen=True)
class Spacing:
    """How far the originals lie apart; None where there are too few.

    Attributes:
        neighbour: median distance of an original to its nearest other one; of consecutive training steps, one step.
        pair: mean distance of all pairs.
    """

    neighbour: float | None
    pair: float | None

    @property
    def copy_limit(self) -> float | None:
        """Below this distance a network counts as a copy: 3 neighbour distances, but at most half of a mean pair's.

        The second part is for originals that all lie equally far apart, as those of independent trainings do.
        """
        return None if self.neighbour is None else min(COPY_FACTOR * self.neighbour, 0.5 * self.pair)


def compute_spacing(originals_KV: Tensor) -> Spacing:
    """Distances among the originals."""
    count = len(originals_KV)
    if count < 2:
        return Spacing(None, None)
    distance_KK = pairwise_distances(originals_KV, originals_KV)
    distance_KK.fill_diagonal_(0.0)
    others_KK = distance_KK + torch.diag(torch.full((count,), torch.inf, dtype=torch.float64))
    return Spacing(float(others_KK.min(1).values.median()), float(distance_KK.sum() / (count * (count - 1))))


@dataclass(frozen=True)
class TensorStatistics:
    """One tensor in two groups of networks.

    Attributes:
        std, generated_std: deviation of the values within a network, mean over networks.
        spread, generated_spread: deviation of a value over the networks of a group, root mean square over values; None
            for a single network. A generator whose spread is far below the originals' has collapsed.
        correlation: of the two groups' mean values.
    """

    name: str
    values: int
    std: float
    generated_std: float
    spread: float | None
    generated_spread: float | None
    correlation: float | None


def tensor_statistics(sample: ValueSample, originals_KV: Tensor, generated_GV: Tensor) -> list[TensorStatistics]:
    """Statistics of every varying tensor, in the order of the state dict."""

    def spread(values_KV: Tensor) -> float | None:
        return float(values_KV.var(0).mean().sqrt()) if len(values_KV) > 1 else None

    rows = []
    for name, shape in sample.shapes.items():
        one_KV = sample.unweighted(originals_KV, name).double()
        other_GV = sample.unweighted(generated_GV, name).double()
        means_2V = torch.stack([one_KV.mean(0), other_GV.mean(0)])
        varies = bool((means_2V.std(1) > 0).all())
        rows.append(
            TensorStatistics(
                name=name,
                values=int(torch.Size(shape).numel()),
                std=float(one_KV.std(1).mean()),
                generated_std=float(other_GV.std(1).mean()),
                spread=spread(one_KV),
                generated_spread=spread(other_GV),
                correlation=float(torch.corrcoef(means_2V)[0, 1]) if varies else None,
            )
        )
    return rows


def principal_plane(groups: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """Coordinates of all networks in the plane of the two largest principal components, and the shares of variance.

    From scalar products between networks (never a V x V matrix), so it costs what the distances cost.
    """
    values_AV = torch.cat(list(groups.values()))
    centre_V = values_AV.mean(0)
    gram_AA = torch.zeros(len(values_AV), len(values_AV), dtype=torch.float64)
    for first in range(0, values_AV.shape[1], COLUMNS):
        part = slice(first, first + COLUMNS)
        centred_AV = values_AV[:, part].double() - centre_V[part].double()
        gram_AA += centred_AV @ centred_AV.T
    eigenvalues, vectors = torch.linalg.eigh(gram_AA)
    eigenvalues, vectors = eigenvalues.flip(0).clamp(min=0), vectors.flip(1)
    plane_A2 = torch.zeros(len(values_AV), 2, dtype=torch.float64)
    kept = min(2, len(values_AV))
    plane_A2[:, :kept] = vectors[:, :kept] * eigenvalues[:kept].sqrt()
    total = max(float(eigenvalues.sum()), 1e-300)
    shares = [float(value) / total for value in eigenvalues[:kept]] + [0.0] * (2 - kept)
    coordinates, first = {}, 0
    for name, values_KV in groups.items():
        coordinates[name] = plane_A2[first : first + len(values_KV)]
        first += len(values_KV)
    return coordinates, (shares[0], shares[1])


def distance_metric(name: str, nearest: Sequence[Nearest]) -> Metric:
    """Mean distance to the nearest original with its standard error over networks."""
    return mean_metric(name, [each.distance for each in nearest])
