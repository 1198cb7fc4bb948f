"""Options of the data that a hypernetwork, or a network with predicted weights, is trained and tested on."""

from dataclasses import dataclass
from typing import Literal

from common.config import require_at_least, require_choice
from common.data.images import AUGMENTATIONS, STATISTICS
from common.errors import ConfigError

KINDS = ("vision", "lm")
IMAGE_SETS = ("digits", "cifar10", "cifar100", "folder")
DEFAULT_SIZES = {"digits": 8, "cifar10": 32, "cifar100": 32, "folder": 224}
DEFAULT_AUGMENTATIONS = {"digits": "none", "cifar10": "crop_flip", "cifar100": "crop_flip", "folder": "resized_crop"}
DEFAULT_STATISTICS = {"digits": "own", "cifar10": "cifar", "cifar100": "cifar", "folder": "imagenet"}
DEFAULT_JITTERS = {"folder": (0.4, 0.4, 0.4, 0.2)}


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Options ``data.*``."""

    kind: Literal["vision", "lm"] = "vision"
    name: str = "digits"  # vision: digits|cifar10|cifar100|folder; lm: training text, see common/data/corpora.py
    batch_size: int = 64  # images or blocks of a training step, over all processes
    eval_batch_size: int = 256  # of validation and test
    num_workers: int = 0  # processes that read ahead; what is read does not depend on them
    limit_train: int | None = None  # use so many training images or blocks, the first (of folders of images: evenly
    # spread over the classes); null: all
    limit_test: int | None = None  # of validation and test each
    held_out: float = 0.0  # share kept for validation where there is none. vision: the last training images (of each
    # class of a folder), lm: random documents of the training text (usual for OpenWebText: 0.0005); 0: as valid says
    held_out_seed: int = 2357  # lm: of those documents

    # vision
    root: str = "data/images"  # folder of the files; of name=folder: ROOT/train/CLASS/*.jpg and ROOT/test or ROOT/val
    download: bool = False  # fetch CIFAR if it is not in root
    size: int | None = None  # side in pixels; null: 8 (digits), 32 (CIFAR), 224 (folder)
    test_resize: int | None = None  # folder: shorter side before the central crop of test images; null: 8/7 of the size
    statistics: Literal["auto", "imagenet", "half", "cifar"] = "auto"  # mean and deviation that are taken out
    augmentation: Literal["auto", "none", "crop", "crop_flip", "resized_crop", "autoaugment_cifar10", "randaugment"] = (
        "auto"  # of training images; auto: none (digits), crop_flip (CIFAR), resized_crop with colour jitter (folder)
    )
    crop_padding: int | None = None  # pixels around an image that a random crop may reach; null: size / 8
    colour_jitter: tuple[float, ...] | None = None  # brightness, contrast, saturation, hue; null: as augmentation=auto
    auto_augment: str | None = None  # timm's RandAugment or AutoAugment by its description, e.g. rand-m7-mstd0.5
    few_shot: int | None = None  # train on the first so many images of each class; null: all
    noise: float = 0.0  # deviation of normal noise on the standardised pixels, in training and tests

    # lm
    valid: str | None = None  # text whose validation part is read; null: that of name
    test: str | None = None  # text whose test part is read; null: that of valid
    tokenizer: str = "gpt2"  # byte, bpe:<vocabulary size> learnt from the training text, a local folder or a hub name
    block_size: int = 1024  # tokens per block
    cache_dir: str | None = "data"  # downloads and token caches; null: memory
    detokenizer: str = "none"  # auto, none, wikitext, ptb, lm1b, lambada
    end_of_text: bool = True  # the tokenizer's end-of-text token closes every document; false: texts are just joined
    group_size: int | None = None  # documents packed together, each group losing its remainder; 1000: as released
    text_unit: Literal["file", "paragraph", "line", "full_line"] | None = None  # a document of a text file

    def __post_init__(self) -> None:
        require_choice("data.kind", self.kind, KINDS)
        if self.kind == "vision":
            require_choice("data.name", self.name, IMAGE_SETS)
        elif self.name in IMAGE_SETS:
            raise ConfigError(f"data.name={self.name} are images; set data.kind=vision, or name a text.")
        require_choice("data.statistics", self.statistics, ("auto", *STATISTICS))
        require_choice("data.augmentation", self.augmentation, ("auto", *AUGMENTATIONS))
        for name in ("batch_size", "eval_batch_size", "block_size"):
            require_at_least(f"data.{name}", getattr(self, name), 1)
        for name in ("num_workers", "noise", "held_out_seed"):
            require_at_least(f"data.{name}", getattr(self, name), 0)
        for name in ("limit_train", "limit_test", "size", "few_shot", "group_size", "test_resize"):
            if getattr(self, name) is not None:
                require_at_least(f"data.{name}", getattr(self, name), 1)
        if not 0 <= self.held_out < 1:
            raise ConfigError(
                f"data.held_out={self.held_out} is a share of the training data; choose 0 or more, below 1."
            )
        if self.kind == "vision":
            self._check_images()
        elif self.held_out and (self.valid or self.test):
            raise ConfigError(
                f"data.held_out={self.held_out} takes validation and tests from the training text, and "
                f"data.valid={self.valid}, data.test={self.test} name others; set data.held_out=0, or leave them out."
            )

    def _check_images(self) -> None:
        if self.name == "digits":
            for option, value, fits in (
                ("augmentation", self.augmentation, self.augmentation in ("auto", "none", "crop")),
                ("auto_augment", self.auto_augment, self.auto_augment is None),
                ("colour_jitter", self.colour_jitter, not self.colour_jitter),
                ("statistics", self.statistics, self.statistics == "auto"),
            ):
                if not fits:
                    raise ConfigError(
                        f"data.{option}={value} is for photographs; digits take augmentation=none or crop and their "
                        "own statistics."
                    )
        if self.auto_augment is not None and self.effective_augmentation == "none":
            raise ConfigError(
                f"data.auto_augment={self.auto_augment} needs augmented images; set data.augmentation=crop_flip or "
                "resized_crop."
            )
        jitter = self.effective_colour_jitter
        if jitter and (len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5):
            raise ConfigError(
                f"data.colour_jitter={list(jitter)} must be four numbers from 0, brightness, contrast, saturation and "
                "hue (at most 0.5); for example [0.4,0.4,0.4,0.2]."
            )

    @property
    def image_size(self) -> int:
        """Side in pixels."""
        return DEFAULT_SIZES[self.name] if self.size is None else self.size

    @property
    def effective_augmentation(self) -> str:
        """``augmentation`` with ``auto`` decided."""
        return DEFAULT_AUGMENTATIONS[self.name] if self.augmentation == "auto" else self.augmentation

    @property
    def effective_statistics(self) -> str:
        """``statistics`` with ``auto`` decided; ``own``: of the training images."""
        return DEFAULT_STATISTICS[self.name] if self.statistics == "auto" else self.statistics

    @property
    def effective_colour_jitter(self) -> tuple[float, ...]:
        """Four strengths, or nothing."""
        if self.colour_jitter is not None:
            return tuple(self.colour_jitter)
        return DEFAULT_JITTERS.get(self.name, ()) if self.augmentation == "auto" else ()
