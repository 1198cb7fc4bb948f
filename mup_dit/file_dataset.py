"""Data sets of image files, decoded, cropped and stacked row by row.

A *source* knows where the images are and what belongs to them; ``FileDataset`` turns its rows into batches.

Dimensions: B rows of a batch, C channels, S side.
"""

import logging
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from common.data.fingerprint import text_fingerprint
from common.errors import ConfigError, DataError
from mup_dit.batches import Batch, Rows, TextEncoder
from mup_dit.images import crop_image, to_tensor

BROKEN = (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for files that are no images, or only a part of one."""

logger = logging.getLogger(__name__)


class ImageSource(Protocol):
    """Where images are. Rows are numbered from 0."""

    name: str
    classes: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def open(self, row: int) -> Image.Image:
        """The image; it may be lazy. Raises OSError, or what Pillow raises, where it cannot be read."""

    def where(self, row: int) -> str:
        """Name of the image for messages."""

    def label(self, row: int) -> int | None: ...

    def caption(self, row: int) -> str | None: ...

    def features(self, row: int) -> Batch | None:
        """Caption features stored with the image: ``caption`` (1, T, Y), ``mask`` (T,)."""

    def latent(self, row: int) -> Batch | None:
        """``mean`` and ``std`` stored in place of the image."""

    def fingerprint(self) -> str: ...


class FileDataset:
    """Batches of the images of a source.

    Args:
        size: S.
        text: encodes captions while loading; None: stored features if there are any, else labels.
        flips: row ``n + i`` is row ``i`` mirrored.
        on_error: ``stop`` at a file that cannot be read, or take the next row in its place with a warning (``skip``).

    Raises: ConfigError if captions are to be encoded but there are none, DataError if there are no images.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        size: int,
        channels: int = 3,
        crop: str = "adm",
        text: TextEncoder | None = None,
        flips: bool = False,
        on_error: str = "stop",
    ) -> None:
        if not len(source):
            raise DataError(f"{source.name} holds no images.")
        if text is not None and source.caption(0) is None:
            raise ConfigError(f"{source.name} has no captions that a text encoder could encode; leave data.text out.")
        self.source, self.size, self.channels, self.crop = source, size, channels, crop
        self.text, self.flips, self.on_error, self.classes = text, flips, on_error, source.classes
        self._warned: set[int] = set()

    def __len__(self) -> int:
        return len(self.source) * (2 if self.flips else 1)

    def fetch(self, rows: Rows) -> Batch:
        """Raises: DataError naming the first file that cannot be read, with ``on_error=stop``."""
        images = len(self.source)
        items = [self._read(int(row) % images) for row in np.asarray(rows)]
        batch = {name: torch.stack([values[name] for _, values in items]) for name in items[0][1]}
        mirrored_B = torch.as_tensor(np.asarray(rows) >= images)
        if bool(mirrored_B.any()):
            batch["image"] = torch.where(mirrored_B[:, None, None, None], batch["image"].flip(-1), batch["image"])
        return batch | self._encoded(np.array([row for row, _ in items]))

    def _encoded(self, rows: Rows) -> Batch:
        return {} if self.text is None else dict(self.text(self.captions(rows)))

    def _item(self, row: int) -> Batch:
        """Pixels or latents of one row, and what is stored with them.

        Raises: DataError naming a file that cannot be read.
        """
        item = self.source.latent(row)
        if item is None:
            image = self.image(row)
            item = {"image": self._cropped(image), "img_hw": torch.tensor([image.height, image.width]).float()}
            item["aspect_ratio"] = torch.ones(1)  # of what the crop leaves
        if self.text is not None:
            return item
        label = self.source.label(row)
        return item | (self.source.features(row) or ({} if label is None else {"label": torch.tensor(label)}))

    def pixels(self, rows: Rows) -> Tensor:
        """Images alone, (B, C, S, S).

        Raises: DataError naming the first that cannot be read, whatever ``on_error``.
        """
        return torch.stack([self._cropped(self.image(int(row))) for row in rows])

    def _cropped(self, image: Image.Image) -> Tensor:
        return to_tensor(crop_image(image, self.size, self.crop, self.channels)[None])[0]

    def image(self, row: int) -> Image.Image:
        """The whole image of a row, before any crop.

        Raises: DataError naming the file if it cannot be read.
        """
        try:
            image = self.source.open(row % len(self.source))
            image.load()
            return image
        except BROKEN as error:
            raise DataError(f"{self.source.where(row % len(self.source))} cannot be read: {_reason(error)}.") from None

    def image_size(self, row: int) -> tuple[int, int]:
        """(height, width) in pixels, from the file's header where the format has one."""
        try:
            image = self.source.open(row % len(self.source))
            return image.height, image.width
        except BROKEN as error:
            raise DataError(f"{self.source.where(row % len(self.source))} cannot be read: {_reason(error)}.") from None

    def labels(self, rows: Rows) -> Rows | None:
        found = [self.source.label(int(row) % len(self.source)) for row in rows]
        return None if any(label is None for label in found) else np.array(found, np.int64)

    def captions(self, rows: Rows) -> list[str] | None:
        found = [self.source.caption(int(row) % len(self.source)) for row in rows]
        return None if any(caption is None for caption in found) else found

    def fingerprint(self) -> str:
        return text_fingerprint("files", self.source.fingerprint(), self.size, self.channels, self.crop, self.flips)

    def _read(self, row: int) -> tuple[int, Batch]:
        """The item of ``row``, or of the next one that can be read; and which it was."""
        for number in range(row, row + len(self.source)):
            number %= len(self.source)
            try:
                return number, self._item(number)
            except DataError as error:
                if self.on_error == "stop":
                    raise DataError(
                        f"{error} Repair or remove it, or go on without it by data.on_error=skip."
                    ) from None
                if number not in self._warned:
                    self._warned.add(number)
                    logger.warning("skipped, and the next image taken in its place: %s", error)
        raise DataError(f"{self.source.name}: none of {len(self.source)} images can be read.")


def _reason(error: Exception) -> str:
    return "the file is missing" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
