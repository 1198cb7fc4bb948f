"""Images with classes: CIFAR files, folders of images, the embedded digits, and how a file becomes a tensor.

Training images are augmented, test images never are (a reported accuracy should not depend on luck). What is drawn for
an image depends on a seed that the caller derives from (run, epoch, index of the image), so neither the number of
loader workers nor a restart in the middle of an epoch changes a training.

Dimensions: N images, H and W pixels.
"""

import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import Dataset

from common.errors import DataError

STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
"""Mean and standard deviation of each channel, by name."""

AUGMENTATIONS = ("none", "crop", "crop_flip", "resized_crop", "autoaugment_cifar10", "randaugment")
TEST_FOLDERS = ("test", "val", "validation")


@contextlib.contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """The CPU generators of torch, numpy and Python start from ``seed`` inside, and are put back afterwards.

    For libraries whose random transformations know no generator (torchvision, timm).
    """
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.random.default_generator.manual_seed(seed)  # unlike torch.manual_seed, it leaves those of GPUs alone
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


class Images:
    """One split.

    Attributes:
        label_N: class of every image, int64.
        class_names: of the data set.
    """

    def __init__(
        self,
        source: Dataset | Sequence,
        label_N: Tensor,
        class_names: Sequence[str],
        transform: Callable | None,
        limit: int | None = None,
    ) -> None:
        self._source, self._transform = source, transform
        self.label_N = label_N[:limit]
        self.class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self.label_N)

    def image(self, index: int, seed: int | None = None) -> Tensor:
        """One image (channels, H, W), float32; augmentations draw from ``seed``."""
        raw = self._source[index][0]
        if self._transform is None:
            return raw
        if seed is None:
            return self._transform(raw)
        with seeded_globals(seed):
            return self._transform(raw)


def build_transform(
    size: int,
    statistics: tuple[Sequence[float], Sequence[float]],
    augmentation: str = "none",
    *,
    crop_padding: int | None = None,
    keep_aspect: bool = False,
    resize: int | None = None,
    colour_jitter: Sequence[float] = (),
    extra: Sequence[Callable] = (),
) -> Callable:
    """Image file -> float32 tensor (3, size, size): resized, cropped, perhaps flipped and augmented, standardised.

    Args:
        size: side in pixels of what comes out.
        statistics: mean and standard deviation of each channel.
        augmentation: one of ``AUGMENTATIONS``; ``crop`` and what follows ``crop_flip`` crop at random, ``resized_crop``
            takes 8 to 100 % of the area (Inception's way of training on ImageNet); all but ``crop`` flip.
        crop_padding: pixels around an image that a random crop may reach; None: size / 8, or 0 with ``keep_aspect``.
        keep_aspect: resize the shorter side and crop, rather than both sides.
        resize: the shorter side before a central crop, e.g. 256 for 224; None: ``size``.
        colour_jitter: brightness, contrast, saturation and hue of training images; empty: none.
        extra: transformations of training images between the flip and the colours.
    """
    from torchvision import transforms

    steps: list[Callable] = []
    if augmentation == "resized_crop":
        steps.append(transforms.RandomResizedCrop(size))
    else:
        side = size if resize is None or augmentation != "none" else resize
        steps.append(transforms.Resize(side) if keep_aspect else transforms.Resize((side, side)))
        if augmentation == "none":
            steps.append(transforms.CenterCrop(size))
        else:
            default = 0 if keep_aspect else size // 8
            padding = default if crop_padding is None else crop_padding
            steps.append(transforms.RandomCrop(size, padding=padding or None))
    if augmentation not in ("none", "crop"):
        steps.append(transforms.RandomHorizontalFlip())
    if augmentation == "autoaugment_cifar10":
        steps.append(transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10))
    elif augmentation == "randaugment":
        steps.append(transforms.RandAugment())
    if augmentation != "none":
        steps += extra
        if colour_jitter:
            steps.append(transforms.ColorJitter(*colour_jitter))
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(*statistics)])


@functools.cache
def embedded_digits() -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1], float32 (1797, 8, 8), and digits (1797) of the handwritten digits embedded in scikit-learn."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.images).float() / 16, torch.from_numpy(data.target).long()


def open_cifar(
    name: str, root: str | Path, *, train: bool, download: bool = False, option: str = "data"
) -> tuple[Dataset, Tensor, Sequence[str]]:
    """Images, classes and the names of the classes of ``cifar10`` or ``cifar100``.

    Args:
        root: folder that holds ``cifar-10-batches-py`` or ``cifar-100-python``.
        option: under which ``download`` is an option of the user's, for messages.

    Raises: DataError if the files are not there, saying where they are expected.
    """
    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    root = Path(root).expanduser()
    try:
        with _download_lock(root) if download else contextlib.nullcontext():
            source = kind(str(root), train=train, download=download)
    except RuntimeError:
        remedy = "" if download else f", or set {option}.download=true"
        raise DataError(
            f"data.root={root}: {name} is not there or damaged; put its files there (folder "
            f"{kind.base_folder}){remedy}."
        ) from None
    except OSError as error:
        raise DataError(
            f"data.root={root}: {name} cannot be downloaded ({error}); put its files (folder {kind.base_folder}) there "
            "yourself."
        ) from None
    return source, torch.tensor(source.targets), source.classes


def _download_lock(root: Path) -> FileLock:
    """Held by the one process of a node that downloads while the others wait."""
    root.mkdir(parents=True, exist_ok=True)
    return FileLock(str(root / ".download.lock"))


def open_image_folder(root: str | Path | None, *, train: bool) -> tuple[Dataset, Tensor, Sequence[str]]:
    """Images, classes and the names of the classes of ``ROOT/train/CLASS/*`` or ``ROOT/test/CLASS/*`` (or ``val``).

    Raises: DataError if there is no such folder, or no image in it.
    """
    from torchvision.datasets import ImageFolder

    if root is None:
        raise DataError("data.name=folder needs data.root=DIR with DIR/train/CLASS/*.jpg and DIR/test (or val).")
    root = Path(root).expanduser()
    names = ("train",) if train else TEST_FOLDERS
    found = [root / name for name in names if (root / name).is_dir()]
    if not found:
        raise DataError(
            f"data.root={root}: there is no folder {' or '.join(names)} in it; images are expected as "
            f"{root / names[0]}/CLASS/FILE.jpg."
        )
    try:
        source = ImageFolder(str(found[0]))
    except FileNotFoundError as error:
        raise DataError(f"{found[0]}: {str(error).splitlines()[0]}") from None
    return source, torch.tensor(source.targets), source.classes
