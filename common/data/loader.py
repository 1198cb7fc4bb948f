"""Loaders over packed datasets: deterministic, endless, resumable at any micro-batch, the same for any worker count.

Global batch ``s`` of G rows holds samples at positions ``[s * G, (s + 1) * G)`` of an endless sequence of epochs;
position ``p`` is row ``permutation(p // n)[p % n]`` of the dataset. Micro-batch ``a`` of rank ``r`` (of W ranks with m
rows each) takes rows ``[(a * W + r) * m, (a * W + r + 1) * m)`` of the global batch, so that one process with two
accumulation steps and two processes with one see the same micro-batches.

Legend: ``n`` rows of the dataset, ``G`` global batch, ``m`` micro-batch, ``W`` ranks.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from common.errors import CheckpointError, ConfigError, DataError
from common.seeding import generator

Batch = dict[str, Tensor]


class BatchedDataset(Protocol):
    """A map-style dataset that can read many rows at once; ``__getitem__`` alone also does, more slowly."""

    def __len__(self) -> int: ...

    def fetch(self, rows: NDArray[np.int64]) -> Batch: ...


class _Rows(Dataset):
    """Indexed by arrays of row numbers: the loader's workers read whole micro-batches."""

    def __init__(self, dataset: BatchedDataset, transform: Callable[[Any], Batch] | None) -> None:
        self.dataset, self.transform = dataset, transform

    def __getitem__(self, rows: NDArray[np.int64]) -> Batch:
        if hasattr(self.dataset, "fetch"):
            batch = self.dataset.fetch(rows)
        else:
            batch = default_collate([self.dataset[int(row)] for row in rows])
        return self.transform(batch) if self.transform else batch


def _as_is(batch: Batch) -> Batch:
    return batch


class ShuffledOrder:
    """Rows at positions of an endless sequence of epochs, each a permutation drawn from (seed, epoch)."""

    def __init__(self, num_rows: int, seed: int, *, shuffle: bool = True) -> None:
        self.num_rows, self.seed, self.shuffle = num_rows, seed, shuffle
        self._permutations: dict[int, NDArray[np.int64]] = {}  # of the current epoch and, across its end, the next

    def rows(self, start: int, count: int) -> NDArray[np.int64]:
        """Rows at positions ``start`` .. ``start + count - 1``."""
        first, last = start // self.num_rows, (start + count - 1) // self.num_rows
        parts = []
        for epoch in range(first, last + 1):
            begin = max(start - epoch * self.num_rows, 0)
            end = min(start + count - epoch * self.num_rows, self.num_rows)
            parts.append(self._permutation(epoch)[begin:end])
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._permutations:
            if self.shuffle:
                order = torch.randperm(self.num_rows, generator=generator(self.seed, "shuffle", epoch)).numpy()
            else:
                order = np.arange(self.num_rows)
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1} | {epoch: order}
        return self._permutations[epoch]


class _Reads:
    """Endless row numbers of one rank, ``per_read`` micro-batches at a time, from micro-batch ``start``."""

    def __init__(
        self, order: ShuffledOrder, *, micro_size: int, rank: int, world_size: int, start: int, per_read: int
    ) -> None:
        self.order, self.micro_size, self.rank, self.world_size = order, micro_size, rank, world_size
        self.start, self.per_read = start, per_read

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        index = self.start
        while True:
            yield np.concatenate([self.micro_batch(index + i) for i in range(self.per_read)])
            index += self.per_read

    def micro_batch(self, index: int) -> NDArray[np.int64]:
        # a * W + r summed over steps: a step has G / m = A * W micro-batches, so no step boundary is needed here.
        return self.order.rows((index * self.world_size + self.rank) * self.micro_size, self.micro_size)


class TrainLoader:
    """Endless micro-batches of one rank; ``for batch in loader`` continues from the current position.

    The position is one number, micro-batches taken so far, so it is exact whatever worker processes have read ahead
    and carries over to another number of workers.
    """

    def __init__(
        self,
        dataset: BatchedDataset,
        *,
        global_size: int,
        micro_size: int,
        seed: int,
        rank: int,
        world_size: int,
        num_workers: int = 0,
        shuffle: bool = True,
        transform: Callable[[Any], Batch] | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        if micro_size < 1 or global_size % (micro_size * world_size):
            raise ConfigError(
                f"The global batch of {global_size} samples is not a multiple of micro-batch {micro_size} x "
                f"{world_size} processes; change training.batch_size or the accumulation."
            )
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} must lie in 0..{world_size - 1} for world_size={world_size}.")
        if not len(dataset):
            raise DataError("The training dataset is empty.")
        self.dataset, self.global_size, self.micro_size = dataset, global_size, micro_size
        self.seed, self.rank, self.world_size, self.num_workers = seed, rank, world_size, num_workers
        self.order = ShuffledOrder(len(dataset), seed, shuffle=shuffle)
        self.transform = transform
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.position = 0  # micro-batches taken

    @property
    def micro_batches_per_step(self) -> int:
        return self.global_size // (self.micro_size * self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        per_read = self._micro_batches_per_read()
        rows = _Reads(
            self.order,
            micro_size=self.micro_size,
            rank=self.rank,
            world_size=self.world_size,
            start=self.position,
            per_read=per_read,
        )
        loader = DataLoader(
            _Rows(self.dataset, self.transform),
            batch_size=None,  # the sampler's items are whole reads
            sampler=rows,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            collate_fn=_as_is,
            # A generator of its own: otherwise every new iterator draws from torch's global one.
            generator=generator(self.seed, "workers", self.rank),
        )
        for read in loader:
            for start in range(0, per_read * self.micro_size, self.micro_size):
                self.position += 1
                yield read if per_read == 1 else {n: t[start : start + self.micro_size] for n, t in read.items()}

    def _micro_batches_per_read(self) -> int:
        """Micro-batches that one message of a worker carries.

        A message takes about a millisecond whatever its size, so that small batches would come slower from a worker
        than from the disk; a dataset that is read fast says by ``rows_per_read`` how many rows are worth one.
        """
        if not self.num_workers or self.transform is not None:
            return 1
        return max(1, getattr(self.dataset, "rows_per_read", 1) // self.micro_size)

    def seek(self, step: int) -> None:
        """Goes to the start of optimizer step ``step`` (from 0); takes effect with the next ``iter``."""
        self.position = step * self.micro_batches_per_step

    def state_dict(self) -> dict:
        """Position after the last micro-batch taken, and what it is relative to."""
        return {
            "micro_batches": self.position,
            "micro_size": self.micro_size,
            "world_size": self.world_size,
            "num_rows": self.order.num_rows,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues after the saved position, also with another micro-batch size or number of processes.

        Raises:
            CheckpointError: another dataset or seed, or a position that falls inside one of the new micro-batches.
        """
        for name, ours in (("num_rows", self.order.num_rows), ("seed", self.seed)):
            if state[name] != ours:
                what = "The dataset has {} rows" if name == "num_rows" else "The seed is {}"
                raise CheckpointError(
                    f"{what.format(ours)}, but the run was saved with {state[name]}: the order of samples would "
                    "change. Use the saved data and seed, or start a new run in another run_dir."
                )
        samples = state["micro_batches"] * state["micro_size"] * state["world_size"]
        per_pass = self.micro_size * self.world_size
        if samples % per_pass:
            raise CheckpointError(
                f"The run was saved after {samples} samples, which is no multiple of micro-batch {self.micro_size} x "
                f"{self.world_size} processes; continue with a layout that divides it."
            )
        self.position = samples // per_pass


def build_train_loader(
    dataset: BatchedDataset,
    *,
    global_size: int,
    micro_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    shuffle: bool = True,
    transform: Callable[[Any], Batch] | None = None,
    pin_memory: bool | None = None,
) -> TrainLoader:
    """Endless micro-batches of one rank in the layout of this module's docstring.

    Args:
        dataset: has ``__len__`` and ``fetch(rows) -> batch`` (or only ``__getitem__``).
        global_size: samples per optimizer step, over all ranks and accumulation passes.
        micro_size: samples per rank and forward pass.
        num_workers: processes that read ahead; 0 reads in this one. The batches do not depend on it.
        transform: applied to every batch, in the workers.
        pin_memory: page-locked batches for asynchronous copies; by default when there is a CUDA device.

    Raises:
        ConfigError: the sizes do not divide, or the rank is out of range.
        DataError: the dataset is empty.
    """
    return TrainLoader(
        dataset,
        global_size=global_size,
        micro_size=micro_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        shuffle=shuffle,
        transform=transform,
        pin_memory=pin_memory,
    )


class ValidationLoader:
    """A fixed, finite list of batches in dataset order, dealt out to ranks in turn; the last may be smaller."""

    def __init__(self, dataset: BatchedDataset, *, batch_size: int, max_samples: int | None = None) -> None:
        if batch_size < 1:
            raise ConfigError(f"Validation batch size {batch_size} must be at least 1.")
        if max_samples is not None and max_samples < 1:
            raise ConfigError(f"max_samples={max_samples} must be at least 1, or null for all.")
        self.batch_size = batch_size
        self.num_samples = min(len(dataset), max_samples or len(dataset))
        if not self.num_samples:
            raise DataError("The validation dataset is empty.")
        self._rows = _Rows(dataset, None)

    def __len__(self) -> int:
        """Batches over all ranks."""
        return -(-self.num_samples // self.batch_size)

    def batches(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, Batch]]:
        """(index over all ranks, batch) of the batches ``rank``, ``rank + world_size``, ...; none is given twice."""
        for index in range(rank, len(self), world_size):
            start = index * self.batch_size
            yield index, self._rows[np.arange(start, min(start + self.batch_size, self.num_samples))]


def build_validation_loader(
    dataset: BatchedDataset, *, batch_size: int, max_samples: int | None = None
) -> ValidationLoader:
    """The first ``max_samples`` rows of ``dataset`` (all by default) in batches, the same at every evaluation.

    Raises:
        ConfigError: a size below 1.
        DataError: the dataset is empty.
    """
    return ValidationLoader(dataset, batch_size=batch_size, max_samples=max_samples)
