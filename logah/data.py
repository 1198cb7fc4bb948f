"""What a run reads: images with classes, or blocks of text; what a step sees is a function of (seed, step) alone.

Training samples lie at the positions of an endless sequence of epochs, each a permutation of the training rows drawn
from (seed, epoch); step s of B samples takes the positions [s B, (s + 1) B), so that no sample is dropped at the end of
an epoch. An augmentation is drawn from (seed, epoch, row). All networks of a meta-batch see the same batch of a step.

    data = build_data(DataSection(name="digits", batch_size=64), seed=1)
    data.training_batch(0)["images"]  # (64, 3, 8, 8)

Dimensions: B samples, S side in pixels, L tokens of a block.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from common.data.loader import ShuffledOrder, TrainLoader
from common.data.tokenizer import Tokenizer
from common.seeding import derive_seed
from logah.data_config import DataSection
from logah.image_data import open_images
from logah.text_data import open_texts

Batch = dict[str, Tensor]

__all__ = ["Batch", "DataSection", "TrainingData", "TrainingRows", "build_data", "build_train_loader"]


class Rows(Protocol):
    """Samples by number."""

    def __len__(self) -> int: ...

    def fetch(self, rows: Sequence[int] | np.ndarray) -> Batch: ...


class TrainingRows(torch.utils.data.Dataset):
    """Training samples by their position in the endless sequence of epochs; ``len`` is that of one epoch."""

    def __init__(self, rows: Rows, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self.order = ShuffledOrder(len(rows), seed)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def rows_per_read(self) -> int:
        """Samples that are worth a message from a loader's worker process."""
        return getattr(self.rows, "rows_per_read", 1)

    def fetch(self, positions: Sequence[int] | np.ndarray) -> Batch:
        """Samples at ``positions``, with the augmentations of their epoch."""
        positions = np.asarray(positions, dtype=np.int64)
        first = int(positions.min())
        chosen = self.order.rows(first, int(positions.max()) - first + 1)[positions - first]
        if not getattr(self.rows, "is_random", False):
            return self.rows.fetch(chosen)
        epochs = positions // len(self.rows)
        seeds = [derive_seed(self.seed, "augmentation", int(e), int(r)) for e, r in zip(epochs, chosen, strict=True)]
        return self.rows.fetch(chosen, seeds)


@dataclass(frozen=True)
class TrainingData:
    """The three splits of a run and the facts that a network must fit.

    Attributes:
        train: by position (see the module); ``validation`` and ``test``: by row, without augmentation.
        tokenizer: of text.
    """

    section: DataSection
    train: TrainingRows
    validation: Rows
    test: Rows
    class_names: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None

    @property
    def kind(self) -> Literal["vision", "lm"]:
        return self.section.kind

    @property
    def batch_size(self) -> int:
        return self.section.batch_size

    @property
    def num_classes(self) -> int:
        """Of images."""
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        """Side in pixels; images have three channels."""
        return self.section.image_size

    @property
    def vocab_size(self) -> int:
        """Of text: ids are 0 .. vocab_size - 1."""
        assert self.tokenizer is not None, "images have no vocabulary"
        return self.tokenizer.vocab_size

    @property
    def eos_id(self) -> int:
        """Of text: the token that closes every document."""
        assert self.tokenizer is not None, "images have no tokens"
        return self.tokenizer.eos_id

    @property
    def block_size(self) -> int:
        """L, tokens of a block of text."""
        return self.section.block_size

    @property
    def num_train(self) -> int:
        """Training samples."""
        return len(self.train)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every sample has been seen, rounded up."""
        return math.ceil(len(self.train) / self.batch_size)

    def with_seed(self, seed: int) -> "TrainingData":
        """The same data in the order, and with the augmentations, of another seed."""
        return replace(self, train=TrainingRows(self.train.rows, seed))

    def training_batch(self, step: int, rows: slice | None = None) -> Batch:
        """What step ``step`` (from 0) trains on.

        Args:
            rows: of the batch, to read only what one process needs; None: all of them.

        Returns: ``{"images": (B, 3, S, S) float32, "labels": (B,)}`` or ``{"tokens": (B, L) int64}``.
        """
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        return self.train.fetch(positions if rows is None else positions[rows])

    def training_batches(self, first_step: int = 0, rows: slice | None = None) -> Iterator[Batch]:
        """Batches of the steps from ``first_step`` on, without end, read ahead by ``num_workers`` processes."""
        yield from DataLoader(
            _Steps(self, rows),
            batch_size=None,
            sampler=_From(first_step),
            num_workers=self.section.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # of its own: otherwise every loader draws from torch's global one
        )

    def validation_batches(self, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """All validation samples in order, dealt out to the processes batch by batch."""
        yield from self._in_order(self.validation, rank, world_size)

    def test_batches(self, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """All test samples in order, dealt out to the processes batch by batch."""
        yield from self._in_order(self.test, rank, world_size)

    def _in_order(self, rows: Rows, rank: int, world_size: int) -> Iterator[Batch]:
        size = self.section.eval_batch_size
        numbers = [np.arange(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
        yield from DataLoader(
            _Reads(rows),
            batch_size=None,
            sampler=numbers[rank::world_size],
            num_workers=self.section.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )


class _Reads(torch.utils.data.Dataset):
    """Indexed by arrays of row numbers."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, numbers: np.ndarray) -> Batch:
        return self.rows.fetch(numbers)


class _Steps(torch.utils.data.Dataset):
    """Indexed by step."""

    def __init__(self, data: TrainingData, rows: slice | None) -> None:
        self.data, self.rows = data, rows

    def __getitem__(self, step: int) -> Batch:
        return self.data.training_batch(step, self.rows)


class _From:
    """first, first + 1, ..."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[int]:
        step = self.first
        while True:
            yield step
            step += 1


class _Limited:
    """The first rows of a data set."""

    def __init__(self, rows: Rows, limit: int) -> None:
        self.rows, self.limit = rows, limit

    def __len__(self) -> int:
        return min(len(self.rows), self.limit)

    def fetch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        return self.rows.fetch(rows)


class _PositionsAreRows:
    """An order for ``TrainLoader`` whose rows are the positions themselves: ``TrainingRows`` does the shuffling."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def rows(self, start: int, count: int) -> np.ndarray:
        return np.arange(start, start + count)


def build_train_loader(
    data: TrainingData, *, micro_size: int, rank: int = 0, world_size: int = 1, num_workers: int | None = None
) -> TrainLoader:
    """The engine's loader: this process's rows of ``training_batch(step)`` in micro-batches of ``micro_size``.

    Raises: ConfigError if the batch is no multiple of micro_size x world_size.
    """
    loader = TrainLoader(
        data.train,
        global_size=data.batch_size,
        micro_size=micro_size,
        seed=data.train.seed,
        rank=rank,
        world_size=world_size,
        num_workers=data.section.num_workers if num_workers is None else num_workers,
    )
    loader.order = _PositionsAreRows(len(data.train))
    return loader


def build_data(section: DataSection, *, seed: int = 0) -> TrainingData:
    """Reads or prepares the data that ``section`` names.

    Args:
        seed: of the order of the samples and of their augmentations; nothing else of the data depends on it.

    Raises: ConfigError for options that do not fit, DataError for data that are missing or damaged.
    """
    if section.kind == "vision":
        train, validation, test = open_images(section)
        names = train.images.class_names
        return TrainingData(section, TrainingRows(train, seed), validation, test, class_names=names)
    texts = open_texts(section)

    def limited(rows: Rows, limit: int | None) -> Rows:
        return rows if limit is None else _Limited(rows, limit)

    return TrainingData(
        section,
        TrainingRows(limited(texts.train, section.limit_train), seed),
        limited(texts.validation, section.limit_test),
        limited(texts.test, section.limit_test),
        tokenizer=texts.tokenizer,
    )
