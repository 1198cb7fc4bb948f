"""Images to train and test classifiers on: CIFAR-10 and CIFAR-100, folders of images (ImageNet), the embedded digits.

Training images are augmented, test images never are (a reported accuracy should not depend on luck). What is drawn for
an image depends on (seed, epoch, index of the image) alone, so neither the number of loader workers nor a restart in
the middle of an epoch changes a training.

Dimensions: B images, H and W pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.config import require_at_least, require_choice
from common.data.images import STATISTICS, Images, build_transform, open_cifar, open_image_folder
from common.errors import DataError
from common.seeding import derive_seed, generator
from rpg.zoo.digits import load_images

DATASETS = ("cifar10", "cifar100", "folder", "digits")
AUGMENTATIONS = ("none", "crop_flip", "autoaugment_cifar10", "randaugment")


@dataclass(frozen=True, kw_only=True)
class ImageDataSection:
    """Options ``recipe.data.*``."""

    name: Literal["cifar10", "cifar100", "folder", "digits"] = "cifar10"
    root: str | None = "data/images"  # folder of the files; of name=folder: ROOT/train/CLASS/*.jpg and ROOT/test or val
    download: bool = False  # fetch CIFAR if it is not in root
    size: int = 32  # side in pixels after resizing
    statistics: Literal["imagenet", "half", "cifar"] = "imagenet"  # mean and deviation that are taken out
    augmentation: Literal["none", "crop_flip", "autoaugment_cifar10", "randaugment"] = "crop_flip"  # of training images
    crop_padding: int | None = None  # pixels around an image that a random crop may reach; null: size / 8
    limit_train: int | None = None  # use the first so many training images; null: all
    limit_test: int | None = None
    num_workers: int = 0  # loader processes; the result does not depend on them

    def __post_init__(self) -> None:
        require_choice("data.name", self.name, DATASETS)
        require_choice("data.statistics", self.statistics, tuple(STATISTICS))
        require_choice("data.augmentation", self.augmentation, AUGMENTATIONS)
        require_at_least("data.size", self.size, 1)
        require_at_least("data.num_workers", self.num_workers, 0)
        for name in ("limit_train", "limit_test"):
            if getattr(self, name) is not None:
                require_at_least(f"data.{name}", getattr(self, name), 1)


class _Rows(Dataset):
    """Addressed by (index, seed of its augmentations), which a batch sampler supplies."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, address: tuple[int, int | None]) -> tuple[Tensor, int]:
        index, seed = address
        return self.images.image(index, seed), int(self.images.label_N[index])


def load_split(section: ImageDataSection, split: Literal["train", "test"]) -> Images:
    """The training images with their augmentation, or the test images without.

    Raises: DataError if the files are not there, saying where they are expected.
    """
    limit = section.limit_train if split == "train" else section.limit_test
    if section.name == "digits":
        return _digits(split, limit)
    train = split == "train"
    if section.name == "folder":
        source, label_N, class_names = open_image_folder(section.root, train=train)
    else:
        root = section.root or "data/images"
        source, label_N, class_names = open_cifar(
            section.name, root, train=train, download=section.download, option="recipe.data"
        )
    if not len(label_N):
        raise DataError(f"data.root={section.root}: there is no image in the {split} split.")
    transform = build_transform(
        section.size,
        STATISTICS[section.statistics],
        section.augmentation if train else "none",
        crop_padding=section.crop_padding,
        keep_aspect=section.name == "folder",
    )
    return Images(source, label_N, class_names, transform, limit)


def _digits(split: str, limit: int | None) -> Images:
    digits = load_images()
    images_N1HW = digits.train_N1HW if split == "train" else digits.test_N1HW
    label_N = digits.train_label_N if split == "train" else digits.test_label_N
    return Images([(image,) for image in images_N1HW], label_N, [str(digit) for digit in range(10)], None, limit)


# ------------------------------------------------------------------------------------------------------------ batches


def steps_per_epoch(images: Images, batch_size: int) -> int:
    """Whole batches of an epoch.

    Raises: DataError if there is none.
    """
    steps = len(images) // batch_size
    if not steps:
        raise DataError(f"recipe.batch_size={batch_size} is more than the {len(images)} training images; lower it.")
    return steps


def epoch_batches(
    images: Images, batch_size: int, *, seed: int, epoch: int, first: int = 0, num_workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole training batches (images (B, channels, H, W), classes (B)) of one epoch in random order.

    Args:
        seed, epoch: decide the order and the augmentations.
        first: number of the first batch wanted; those before are not read.
    """
    order = torch.randperm(len(images), generator=generator(seed, "order", epoch)).tolist()
    batches = [
        [(index, derive_seed(seed, "augmentation", epoch, index)) for index in order[start : start + batch_size]]
        for start in range(first * batch_size, len(order) - batch_size + 1, batch_size)
    ]
    yield from _load(images, batches, num_workers)


def ordered_batches(images: Images, batch_size: int, *, num_workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in their order."""
    rows = [(index, None) for index in range(len(images))]
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    yield from _load(images, batches, num_workers)


def _load(images: Images, batches: list, num_workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from DataLoader(
        _Rows(images), batch_sampler=batches, num_workers=num_workers, pin_memory=torch.cuda.is_available()
    )
