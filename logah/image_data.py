"""Images of one split as batches of tensors: training images with their augmentations, test images without.

Dimensions: N images, B rows of a batch, S side in pixels.
"""

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.data.images import (
    STATISTICS,
    Images,
    build_transform,
    embedded_digits,
    open_cifar,
    open_image_folder,
)
from common.errors import ConfigError, DataError
from common.seeding import derive_seed
from logah.data_config import DataSection

Batch = dict[str, Tensor]
HELD_OUT_DIGITS, DIGITS_SPLIT_SEED = 360, 0


class Readable(Protocol):
    """Standardised images by number."""

    label_N: Tensor
    class_names: tuple[str, ...]
    is_augmented: bool

    def batch(self, index_B: Tensor, seeds: Sequence[int] | None) -> Tensor:
        """Images (B, 3, S, S) float32, augmented as the seeds decide; without seeds as they are."""


class TensorImages:
    """Images in memory: cropped at random and mirrored as a batch, ten times faster than one by one.

    Args:
        pixels_NCSS: uint8, or float32 in [0, 1]; a single channel becomes three equal ones.
        statistics: mean and deviation of each channel, which are taken out.
        padding: black pixels around an image that a random crop may reach.
        flip: whether half of the augmented images are mirrored.
    """

    def __init__(
        self,
        pixels_NCSS: Tensor,
        label_N: Tensor,
        class_names: Sequence[str],
        *,
        statistics: tuple[Sequence[float], Sequence[float]],
        padding: int = 0,
        flip: bool = False,
    ) -> None:
        self.label_N, self.class_names = label_N, tuple(class_names)
        self.mean_C11, self.deviation_C11 = (torch.tensor(part)[:, None, None] for part in statistics)
        self.padding, self.flip = padding, flip
        self.pixels_NCSS = pixels_NCSS
        if pixels_NCSS.is_floating_point():  # standardised once; bytes are left small
            self.pixels_NCSS = self._standardise(pixels_NCSS)

    @property
    def is_augmented(self) -> bool:
        """Whether seeds make a difference."""
        return self.padding > 0 or self.flip

    def batch(self, index_B: Tensor, seeds: Sequence[int] | None) -> Tensor:
        """See ``Readable``."""
        pixels_BCSS = self.pixels_NCSS[index_B]
        if seeds is not None and self.is_augmented:
            pixels_BCSS = self._augment(pixels_BCSS, torch.as_tensor(seeds))
        if pixels_BCSS.dtype == torch.uint8:
            pixels_BCSS = self._standardise(pixels_BCSS.float() / 255)
        return pixels_BCSS.repeat(1, 3, 1, 1) if pixels_BCSS.shape[1] == 1 else pixels_BCSS

    def _standardise(self, pixels_NCSS: Tensor) -> Tensor:
        return (pixels_NCSS - self.mean_C11) / self.deviation_C11

    def _augment(self, pixels_BCSS: Tensor, seed_B: Tensor) -> Tensor:
        # the seeds are digests, 63 even bits: their parts serve as the draws
        size, places = pixels_BCSS.shape[-1], 2 * self.padding + 1
        black = 0 if pixels_BCSS.dtype == torch.uint8 else float(-self.mean_C11[0] / self.deviation_C11[0])
        padded = F.pad(pixels_BCSS, (self.padding,) * 4, value=black)
        span_S = torch.arange(size)
        row_BS = (seed_B & 0xFFFFF)[:, None] % places + span_S
        column_BS = (seed_B >> 20 & 0xFFFFF)[:, None] % places + span_S
        if self.flip:
            column_BS = torch.where((seed_B >> 40 & 1)[:, None] == 1, column_BS.flip(1), column_BS)
        image_B = torch.arange(len(seed_B))[:, None, None]
        moved_BSSC = padded.permute(0, 2, 3, 1)[image_B, row_BS[:, :, None], column_BS[:, None, :]]
        return moved_BSSC.permute(0, 3, 1, 2)


class FileImages:
    """Images that are read, and transformed, one by one; ``augmented`` are the same images with random changes."""

    def __init__(self, images: Images, augmented: Images | None = None) -> None:
        self.images, self.augmented = images, augmented or images
        self.is_augmented = augmented is not None
        self.label_N, self.class_names = images.label_N, images.class_names

    def batch(self, index_B: Tensor, seeds: Sequence[int] | None) -> Tensor:
        """See ``Readable``."""
        if seeds is None:
            return torch.stack([self.images.image(int(i)) for i in index_B])
        return torch.stack([self.augmented.image(int(i), seed) for i, seed in zip(index_B, seeds, strict=True)])


class ImageRows(torch.utils.data.Dataset):
    """Some of a split's images: ``fetch(rows) -> {"images": (B, 3, S, S) float32, "labels": (B,) int64}``.

    Args:
        index_N: numbers of these images in ``images``.
        noise: deviation of normal noise on the pixels, drawn from the seed of a row.
        noise_seed: of rows that come without a seed (tests), so that every evaluation sees the same noise.
    """

    def __init__(self, images: Readable, index_N: Tensor, *, noise: float = 0.0, noise_seed: int = 0) -> None:
        self.images, self.index_N, self.noise, self.noise_seed = images, index_N, noise, noise_seed
        self.label_N = images.label_N[index_N]

    def __len__(self) -> int:
        return len(self.index_N)

    @property
    def is_random(self) -> bool:
        """Whether seeds make a difference."""
        return self.images.is_augmented or self.noise > 0

    def __getitem__(self, row: int) -> Batch:
        return {name: values[0] for name, values in self.fetch([row]).items()}

    def fetch(self, rows: Sequence[int] | np.ndarray, seeds: Sequence[int] | None = None) -> Batch:
        """Images and classes of ``rows``; ``seeds`` decide their augmentations, without seeds there are none."""
        rows = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        index_B = self.index_N[rows]
        images_B3SS = self.images.batch(index_B, seeds)
        if self.noise:
            if seeds is None:
                seeds = [derive_seed(self.noise_seed, "test noise", int(i)) for i in index_B]
            shape = images_B3SS.shape[1:]
            draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed ^ 1)) for seed in seeds]
            images_B3SS = images_B3SS + self.noise * torch.stack(draws)
        return {"images": images_B3SS, "labels": self.label_N[rows]}


def open_images(section: DataSection) -> tuple[ImageRows, ImageRows, ImageRows]:
    """Training, validation and test images.

    Validation images are the last ``held_out`` of the training images, without augmentation; the test images where
    nothing is held out. Folders come sorted by class: of them it is the last of each class, and limits take images
    that are evenly spread.

    Raises: DataError if the files are not there, or a split is empty.
    """
    train, test = _read_digits(section) if section.name == "digits" else _read_files(section)
    for images, split in ((train, "training"), (test, "test")):
        if not len(images.label_N):
            raise DataError(f"data.root={section.root}: there is no image in the {split} split.")
    is_sorted = section.name == "folder"
    kept, held_out = _divide(train.label_N, section.held_out, by_class=is_sorted)
    if section.few_shot is not None:
        kept = kept[first_of_each_class(train.label_N[kept], section.few_shot)]
    kept = _limited(kept, section.limit_train, spread=is_sorted)
    tests = _limited(torch.arange(len(test.label_N)), section.limit_test, spread=is_sorted)
    test_rows = ImageRows(test, tests, noise=section.noise, noise_seed=1)
    if len(held_out):
        held_out = _limited(held_out, section.limit_test, spread=is_sorted)
        validation = ImageRows(train, held_out, noise=section.noise)
    else:
        validation = test_rows
    return ImageRows(train, kept, noise=section.noise), validation, test_rows


def first_of_each_class(label_N: Tensor, count: int) -> Tensor:
    """Numbers of the first ``count`` images of each class, ascending."""
    order_N = label_N.argsort(stable=True)
    size_C = label_N.bincount()
    start_C = size_C.cumsum(0) - size_C
    rank_N = torch.arange(len(label_N)) - start_C[label_N[order_N]]  # 0 for the first of its class
    return order_N[rank_N < count].sort().values


def _divide(label_N: Tensor, held_out: float, *, by_class: bool) -> tuple[Tensor, Tensor]:
    """Numbers of the images that are trained on, and of the last ones, which are not."""
    class_N = label_N if by_class else torch.zeros_like(label_N)
    groups = [torch.nonzero(class_N == number).flatten() for number in class_N.unique()]
    cuts = [len(group) - int(len(group) * held_out) for group in groups]
    kept = torch.cat([group[:cut] for group, cut in zip(groups, cuts, strict=True)])
    if held_out and len(kept) == len(label_N):
        raise DataError(
            f"data.held_out={held_out} of {len(groups[0])} training images{' of a class' if by_class else ''} is none; "
            "choose a larger share."
        )
    rest = torch.cat([group[cut:] for group, cut in zip(groups, cuts, strict=True)])
    return kept.sort().values, rest.sort().values


def _limited(index_N: Tensor, limit: int | None, *, spread: bool) -> Tensor:
    if limit is None or limit >= len(index_N):
        return index_N
    return index_N[torch.arange(limit) * len(index_N) // limit] if spread else index_N[:limit]


@functools.cache
def split_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training pixels in [0, 1] (1437, 8, 8) and digits, test pixels (360, 8, 8) and digits, stratified."""
    from sklearn.model_selection import train_test_split

    pixels_N88, label_N = embedded_digits()
    train, test = train_test_split(
        np.arange(len(label_N)), test_size=HELD_OUT_DIGITS, random_state=DIGITS_SPLIT_SEED, stratify=label_N.numpy()
    )
    return pixels_N88[train], label_N[train], pixels_N88[test], label_N[test]


def _read_digits(section: DataSection) -> tuple[Readable, Readable]:
    train_N88, train_label_N, test_N88, test_label_N = split_digits()
    names = [str(digit) for digit in range(10)]
    statistics = [float(train_N88.mean())], [float(train_N88.std())]

    def pixels(pixels_N88: Tensor) -> Tensor:
        size = section.image_size
        pixels_N1SS = pixels_N88[:, None]
        if size == pixels_N88.shape[-1]:
            return pixels_N1SS
        return F.interpolate(pixels_N1SS, size=(size, size), mode="bilinear", align_corners=False)

    train = TensorImages(pixels(train_N88), train_label_N, names, statistics=statistics, **_moves(section))
    test = TensorImages(pixels(test_N88), test_label_N, names, statistics=statistics)
    return train, test


def _moves(section: DataSection) -> dict[str, Any]:
    """What ``TensorImages`` does to training images."""
    if section.effective_augmentation == "none":
        return {}
    padding = max(1, section.image_size // 8) if section.crop_padding is None else section.crop_padding
    return {"padding": padding, "flip": section.effective_augmentation == "crop_flip"}


def _read_files(section: DataSection) -> tuple[Readable, Readable]:
    is_folder = section.name == "folder"

    def read(*, train: bool):
        if is_folder:
            return open_image_folder(section.root, train=train)
        return open_cifar(section.name, section.root, train=train, download=section.download)

    train, train_label_N, names = read(train=True)
    test, test_label_N, test_names = read(train=False)
    if tuple(names) != tuple(test_names):
        raise DataError(
            f"data.root={section.root}: the training and test images have different classes, {len(names)} and "
            f"{len(test_names)} folders; both need one folder of the same name per class."
        )
    if not is_folder and _fits_memory(section):
        statistics = STATISTICS[section.effective_statistics]
        pixels = [torch.from_numpy(source.data).permute(0, 3, 1, 2) for source in (train, test)]
        moved = TensorImages(pixels[0], train_label_N, names, statistics=statistics, **_moves(section))
        return moved, TensorImages(pixels[1], test_label_N, names, statistics=statistics)
    changed, plain = _transform(section, augmented=True), _transform(section, augmented=False)
    return (
        FileImages(Images(train, train_label_N, names, plain), Images(train, train_label_N, names, changed)),
        FileImages(Images(test, test_label_N, names, plain)),
    )


def _fits_memory(section: DataSection) -> bool:
    """Whether CIFAR at these options needs no transformation that works on single images only."""
    simple = section.effective_augmentation in ("none", "crop", "crop_flip")
    return simple and section.image_size == 32 and not section.auto_augment and not section.effective_colour_jitter


def _transform(section: DataSection, *, augmented: bool):
    size, extra = section.image_size, []
    if augmented and section.auto_augment is not None:
        extra.append(_timm_augmentation(section.auto_augment, size))
    is_folder = section.name == "folder"
    resize = section.test_resize or (size * 8 // 7 if is_folder else size)
    return build_transform(
        size,
        STATISTICS[section.effective_statistics],
        section.effective_augmentation if augmented else "none",
        crop_padding=section.crop_padding,
        keep_aspect=is_folder,
        resize=resize,
        colour_jitter=section.effective_colour_jitter,
        extra=extra,
    )


def _timm_augmentation(description: str, size: int):
    from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

    options = {"translate_const": int(size * 0.45), "img_mean": (124, 116, 104)}
    build = auto_augment_transform
    if description.startswith("rand"):
        build = rand_augment_transform
    elif description.startswith("augmix"):
        build = augment_and_mix_transform
    try:
        return build(description, options)
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(
            f"data.auto_augment={description!r} is no augmentation that timm knows ({error or type(error).__name__}); "
            "for example rand-m7-mstd0.5, augmix or original."
        ) from None
