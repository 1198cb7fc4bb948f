"""Several token datasets mixed by weight into one: deterministic, resumable at any sample, disjoint over ranks.

Which source sample p comes from, and which of that source's rows, depends on (weights, seed, p) alone. The mixture is
a map-style dataset, so that ``common/data/loader.py`` gives every rank its own samples and resumes at a sample's
number; nothing depends on how many processes or workers read. It is shuffled already: ``build_train_loader(mixture,
..., shuffle=False)``.

Dimensions: S sources, n samples, B rows fetched, L block length.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.config import require_at_least
from common.data.dataset import TextInfo
from common.data.loader import BatchedDataset
from common.errors import ConfigError, DataError
from common.seeding import generator

# File weights of the 7B model's data. Source: specification 1.
SEVEN_B_WEIGHTS: dict[str, float] = {"slimpajama": 0.693584, "starcoder": 0.306416}


def source_sequence(weights: Sequence[float], count: int, seed: int) -> NDArray[np.int16]:
    """Source of each of ``count`` samples: what ``random.Random(seed).choices`` would draw one by one.

    numpy's legacy generator, seeded with a list, gives the same uniforms as Python's, all at once.

    Source: specification 7 (the reference mixes per sample with one such generator).
    """
    cumulative_S = np.cumsum(np.asarray(weights, dtype=np.float64))
    uniform_n = np.random.RandomState([seed]).random_sample(count)
    drawn_n = np.searchsorted(cumulative_S, uniform_n * cumulative_S[-1], side="right")
    return np.minimum(drawn_n, len(cumulative_S) - 1).astype(np.int16)


def mixing_weights(weights: Mapping[str, float], names: Sequence[str]) -> list[float]:
    """The weights in the order of ``names``.

    Raises: ConfigError unless every source has a weight and every weight a source, all positive numbers.
    """
    missing, unknown = sorted(set(names) - set(weights)), sorted(set(weights) - set(names))
    if missing or unknown:
        raise ConfigError(
            f"mixing weights name {', '.join(weights) or 'no source'}, the data {', '.join(names)}; "
            + (f"give {', '.join(missing)} a weight" if missing else f"remove {', '.join(unknown)}")
            + "."
        )
    for name in names:
        if not (np.isfinite(weights[name]) and weights[name] > 0):
            raise ConfigError(f"the mixing weight {name}={weights[name]} must be a positive number.")
    return [float(weights[name]) for name in names]


class MixedDataset(torch.utils.data.Dataset):
    """n samples of S datasets: ``dataset[p] -> {"tokens": (L,) int64}``.

    Every source is read epoch after epoch, each in its own permutation. By default the mixture ends where the first
    source has been read once; a run that takes more samples should say how many, so that the sources with rows left
    go on instead of the same samples coming again.

    Args:
        sources: name -> dataset with ``len`` and ``fetch`` and rows of one length.
        weights: name -> weight, in any unit.
        seed: of the mixture and of each source's order.
        num_samples: n; None: as above.
        shuffle: permute each source's rows.

    Raises: ConfigError for weights that do not fit, sources of different lengths; DataError for an empty source.
    """

    def __init__(
        self,
        sources: Mapping[str, BatchedDataset],
        weights: Mapping[str, float],
        *,
        seed: int,
        num_samples: int | None = None,
        shuffle: bool = True,
    ) -> None:
        if not sources:
            raise ConfigError("a mixture needs at least one source.")
        self.names = list(sources)
        weight_S = mixing_weights(weights, self.names)
        self.sources = [sources[name] for name in self.names]
        for name, dataset in sources.items():
            if not len(dataset):
                raise DataError(f"{name}, a source of the mixture, is empty.")
        lengths = {name: dataset.length for name, dataset in sources.items() if hasattr(dataset, "length")}
        if len(set(lengths.values())) > 1:
            spelled = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ConfigError(f"the sources of a mixture have rows of different lengths ({spelled}); open them alike.")
        if num_samples is None:
            total = sum(weight_S)
            num_samples = max(1, int(min(len(d) * total / w for d, w in zip(self.sources, weight_S, strict=True))))
        require_at_least("num_samples", num_samples, 1)
        self.source_n = source_sequence(weight_S, num_samples, seed)
        self.place_n = self._places()
        self.seed, self.shuffle = seed, shuffle
        self._permutations: dict[tuple[int, int], NDArray[np.int64]] = {}  # of (source, epoch), drawn when needed
        if lengths:
            self.length = next(iter(lengths.values()))

    def _places(self) -> NDArray[np.int64]:
        """How many earlier samples come from the same source."""
        place_n = np.empty(len(self.source_n), dtype=np.int64)
        for source in range(len(self.sources)):
            of_source = np.flatnonzero(self.source_n == source)
            place_n[of_source] = np.arange(len(of_source))
        return place_n

    def __len__(self) -> int:
        return len(self.source_n)

    @property
    def rows_per_read(self) -> int:
        return min(getattr(dataset, "rows_per_read", 1) for dataset in self.sources)

    @property
    def info(self) -> TextInfo:
        """Sums over the sources; ``blocks`` is the number of samples."""
        parts = [dataset.info for dataset in self.sources]
        return TextInfo(
            name=" + ".join(self.names),
            split=parts[0].split,
            length=parts[0].length,
            vocab_size=max(part.vocab_size for part in parts),
            documents=sum(part.documents for part in parts),
            tokens=sum(part.tokens for part in parts),
            blocks=len(self),
            dropped_tokens=sum(part.dropped_tokens for part in parts),
        )

    def counts(self) -> dict[str, int]:
        """Samples of each source."""
        found_S = np.bincount(self.source_n, minlength=len(self.sources))
        return dict(zip(self.names, found_S.tolist(), strict=True))

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.fetch([row]).items()}

    def fetch(self, rows: NDArray | Tensor | Sequence[int]) -> dict[str, Tensor]:
        """``{"tokens": (B, L)}`` (and what else the sources give) for B sample numbers in any order."""
        rows_B = np.asarray(rows, dtype=np.int64)
        source_B, place_B = self.source_n[rows_B], self.place_n[rows_B]
        parts, order = [], []
        for source in np.unique(source_B):
            at = np.flatnonzero(source_B == source)
            parts.append(self.sources[source].fetch(self._rows_of(int(source), place_B[at])))
            order.append(at)
        back = torch.from_numpy(np.argsort(np.concatenate(order), kind="stable"))
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}

    def _rows_of(self, source: int, place_B: NDArray) -> NDArray[np.int64]:
        """Rows of a source at positions of its endless sequence of epochs."""
        size = len(self.sources[source])
        epoch_B, row_B = np.divmod(place_B, size)
        if self.shuffle:
            for epoch in np.unique(epoch_B):
                at = epoch_B == epoch
                row_B[at] = self._permutation(source, int(epoch))[row_B[at]]
        return row_B

    def _permutation(self, source: int, epoch: int) -> NDArray[np.int64]:
        key = (source, epoch)
        if key not in self._permutations:
            rng = generator(self.seed, f"mix {self.names[source]}", epoch)
            self._permutations[key] = torch.randperm(len(self.sources[source]), generator=rng).numpy()
        return self._permutations[key]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_permutations": {}}
