"""What a data set of images gives, whatever it reads.

A batch holds ``image`` (B, C, S, S) in [-1, 1], or ``mean`` and ``std`` of cached latents, and ``label`` (B,) or
``caption`` (B, 1, T, Y) with ``mask`` (B, T) and, where the text encoder has one, ``pooled`` (B, P).

Dimensions: B rows, C channels, S side, T caption tokens, Y their channels, P channels of pooled text.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Batch = dict[str, Tensor]
Rows = NDArray[np.int64]
SPLITS = ("train", "validation")
ON_ERROR = ("stop", "skip")


class TextEncoder(Protocol):
    """Captions -> ``caption`` (B, 1, T, Y), ``mask`` (B, T) and, where it has one, ``pooled`` (B, P)."""

    length: int  # T
    channels: int  # Y

    def __call__(self, captions: Sequence[str]) -> Batch: ...


class ImageDataset(Protocol):
    """What training, extraction and evaluation use of a data set."""

    classes: tuple[str, ...] | None  # names by label

    def __len__(self) -> int: ...

    def fetch(self, rows: Rows) -> Batch:
        """One batch.

        Raises: DataError naming a file that is missing or broken.
        """

    def labels(self, rows: Rows) -> Rows | None:
        """Classes of rows; None if the data set has none."""

    def captions(self, rows: Rows) -> list[str] | None:
        """Captions of rows; None if the data set has none."""

    def fingerprint(self) -> str:
        """Hex digest of everything that the batches depend on."""
