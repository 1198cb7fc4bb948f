"""Batches of one image size each, for training at several aspect ratios.

Every global batch takes rows of one bucket, so that its latents can be stacked. An epoch is a permutation of all whole
batches; rows that do not fill one wait for the next epoch's permutation.

Legend: ``G`` global batch.
"""

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch

from common.data.loader import TrainLoader, build_train_loader
from common.errors import ConfigError, DataError
from common.seeding import generator
from mup_dit.batches import Rows
from mup_dit.feature_dataset import FeatureDataset


class BucketOrder:
    """Rows at positions of an endless sequence of epochs; positions ``[k G, (k + 1) G)`` are of one bucket.

    Args:
        buckets: rows by bucket.
        min_rows: rarer buckets are left out (``valid_num`` of PixArt-alpha).

    Raises: DataError if no bucket fills a batch.
    """

    def __init__(
        self, buckets: Mapping[Hashable, Rows], batch_size: int, seed: int, *, min_rows: int = 0, shuffle: bool = True
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch size {batch_size} must be at least 1.")
        kept = {key: rows for key, rows in buckets.items() if len(rows) >= max(min_rows, batch_size)}
        if not kept:
            largest = max((len(rows) for rows in buckets.values()), default=0)
            raise DataError(
                f"no bucket has enough images for batches of {batch_size}: the largest has {largest}, and buckets of "
                f"fewer than {min_rows} are left out; use a smaller batch."
            )
        self.buckets = [kept[key] for key in sorted(kept)]
        self.dropped = sum(map(len, buckets.values())) - sum(map(len, self.buckets))
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.num_batches = sum(len(rows) // batch_size for rows in self.buckets)
        self.num_rows = self.num_batches * batch_size  # per epoch
        self._epochs: dict[int, Rows] = {}  # the current and, across its end, the next

    def rows(self, start: int, count: int) -> Rows:
        """Rows at positions ``start`` .. ``start + count - 1``."""
        first, last = start // self.num_rows, (start + count - 1) // self.num_rows
        parts = []
        for epoch in range(first, last + 1):
            begin = max(start - epoch * self.num_rows, 0)
            parts.append(self._epoch(epoch)[begin : min(start + count - epoch * self.num_rows, self.num_rows)])
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> Rows:
        if epoch not in self._epochs:
            rng = generator(self.seed, "bucket shuffle", epoch)
            batches = []
            for rows in self.buckets:
                mixed = rows[torch.randperm(len(rows), generator=rng).numpy()] if self.shuffle else rows
                whole = len(rows) // self.batch_size * self.batch_size
                batches.append(mixed[:whole].reshape(-1, self.batch_size))
            stacked = np.concatenate(batches)
            if self.shuffle:
                stacked = stacked[torch.randperm(len(stacked), generator=rng).numpy()]
            self._epochs = {e: order for e, order in self._epochs.items() if e == epoch - 1} | {epoch: stacked.ravel()}
        return self._epochs[epoch]


def build_bucket_loader(
    dataset: FeatureDataset, *, global_size: int, seed: int, min_rows: int = 0, **layout: Any
) -> TrainLoader:
    """``common.data.loader``'s loader over ``dataset``, every global batch of one size; it resumes as all do.

    Args:
        layout: ``micro_size``, ``rank``, ``world_size``, ``num_workers``, ... of ``build_train_loader``.

    Raises: ConfigError if the sizes do not divide, DataError if no bucket fills a batch.
    """
    loader = build_train_loader(dataset, global_size=global_size, seed=seed, **layout)
    buckets = dict(dataset.buckets)
    if dataset.flips:
        buckets = {size: np.concatenate([rows, rows + dataset.num_images]) for size, rows in buckets.items()}
    loader.order = BucketOrder(buckets, global_size, seed, min_rows=min_rows, shuffle=layout.get("shuffle", True))
    return loader
