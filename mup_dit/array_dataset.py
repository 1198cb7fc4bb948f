"""Data sets that fit in memory: the digits, ``.npz`` files.

Dimensions: N images, B rows of a batch, C channels, S side, H, W rows and columns of pixels.
"""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.config import require_choice
from common.data.fingerprint import text_fingerprint
from common.errors import ConfigError, DataError
from mup_dit.batches import SPLITS, Batch, Rows, TextEncoder

DIGITS_SIDE, DIGITS_TRAIN = 8, 1536
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class ArrayDataset:
    """Images that fit in memory.

    Args:
        image_NCSS: float in [-1, 1], or uint8, which ``fetch`` maps to [-1, 1].
        label_N: classes; None: without labels.
        text: encodes the captions of the classes, which then take the place of the labels.
        class_captions: one per class.
        flips: row ``n + i`` is row ``i`` mirrored, so that half of all draws are.
    """

    def __init__(
        self,
        image_NCSS: Tensor,
        label_N: Tensor | None = None,
        *,
        classes: tuple[str, ...] | None = None,
        class_captions: Sequence[str] | None = None,
        text: TextEncoder | None = None,
        flips: bool = False,
        name: str = "images",
    ) -> None:
        if text is not None and (class_captions is None or label_N is None):
            raise ConfigError(f"{name} has no captions that a text encoder could encode; leave data.text out.")
        self.image_NCSS, self.label_N, self.classes = image_NCSS, label_N, classes
        self.class_captions, self.flips, self.name, self.text = class_captions, flips, name, text
        # captions are those of the classes: encoded once
        self._encoded = None if text is None else text(class_captions)

    def __len__(self) -> int:
        return len(self.image_NCSS) * (2 if self.flips else 1)

    def fetch(self, rows: Rows) -> Batch:
        rows = torch.as_tensor(np.asarray(rows))
        images = len(self.image_NCSS)
        image = self.image_NCSS[rows % images]
        image = image.to(torch.float32) / 127.5 - 1.0 if image.dtype == torch.uint8 else image
        if self.flips:
            image = torch.where((rows >= images)[:, None, None, None], image.flip(-1), image)
        batch = {"image": image}
        if self.label_N is not None:
            label = self.label_N[rows % images]
            batch |= {"label": label} if self._encoded is None else {k: v[label] for k, v in self._encoded.items()}
        return batch

    def labels(self, rows: Rows) -> Rows | None:
        return None if self.label_N is None else self.label_N.numpy()[np.asarray(rows) % len(self.image_NCSS)]

    def captions(self, rows: Rows) -> list[str] | None:
        if self.class_captions is None or self.label_N is None:
            return None
        return [self.class_captions[label] for label in self.labels(rows)]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.image_NCSS.contiguous().numpy())
        if self.label_N is not None:
            digest.update(self.label_N.numpy())
        return text_fingerprint(
            "array", digest.hexdigest(), tuple(self.image_NCSS.shape), self.class_captions, self.flips
        )


def digit_captions() -> tuple[str, ...]:
    """Caption of each class."""
    return tuple(f"a handwritten digit {name}" for name in DIGIT_NAMES)


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    """(1797, 1, 8, 8) float32 in [-1, 1] and their labels."""
    from sklearn.datasets import load_digits  # embedded in the package

    data = load_digits()
    image = torch.from_numpy(data.images).to(torch.float32)[:, None] / 8.0 - 1.0
    return image, torch.from_numpy(data.target).to(torch.int64)


def load_digits_split(
    split: str, *, size: int = DIGITS_SIDE, channels: int = 1, flips: bool = False, text: TextEncoder | None = None
) -> ArrayDataset:
    """The digits: values 0..16 divided by 8, minus 1. The first 1536 are to train on, the other 261 to validate.

    Args:
        size: a multiple of 8: every pixel becomes a square, for encoders that need larger images.
        channels: 1, or 3 equal ones.

    Raises: ConfigError for another size or number of channels.
    """
    require_choice("split", split, SPLITS)
    require_choice("channels", channels, (1, 3))
    if size < DIGITS_SIDE or size % DIGITS_SIDE:
        raise ConfigError(f"digits of size {size}: they are 8 x 8; choose 8 or a multiple of it.")
    image, label = _digits()
    chosen = slice(None, DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
    image, label = image[chosen], label[chosen]
    factor = size // DIGITS_SIDE
    if factor > 1:
        image = image.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    if channels > 1:
        image = image.expand(-1, channels, -1, -1).contiguous()
    return ArrayDataset(
        image,
        label,
        classes=DIGIT_NAMES,
        class_captions=digit_captions(),
        text=text,
        flips=flips,
        name="digits",
    )


def load_npz(path: str | Path, *, size: int | None, channels: int = 3, flips: bool = False) -> ArrayDataset:
    """Images of an ``.npz``, whole in memory.

    Raises: DataError for a file that is missing, broken, or holds no uint8 images of this size.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "arr_0" not in arrays:
                raise DataError(f"{path} holds {', '.join(arrays.files)}, but no arr_0 (uint8 images N, H, W, C).")
            pixels = arrays["arr_0"]
            named = next((arrays[name] for name in ("arr_1", "labels", "label") if name in arrays), None)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; give npz:FILE with uint8 images as arr_0.") from None
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is no .npz of plain arrays ({error}).") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
        raise DataError(f"{path}: arr_0 is {pixels.dtype} {pixels.shape}; images are uint8 (N, H, W, 1 or 3).")
    if size is not None and pixels.shape[1:3] != (size, size):
        raise DataError(f"{path}: images have {pixels.shape[1]} x {pixels.shape[2]} pixels, but size={size} is asked.")
    if pixels.shape[-1] != channels:
        raise DataError(f"{path}: images have {pixels.shape[-1]} channels, but {channels} are asked for.")
    label = None
    if named is not None:
        if len(named) != len(pixels):
            raise DataError(f"{path}: {len(named)} labels for {len(pixels)} images.")
        label = torch.from_numpy(named.astype(np.int64))
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    return ArrayDataset(image, label, flips=flips, name=str(path))
