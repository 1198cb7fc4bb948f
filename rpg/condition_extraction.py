"""Conditions of checkpoints from what their tasks look like (example images) or read like (sentences).

For every checkpoint whose name says its task, k images of each positive class are drawn and their mean feature becomes
its condition; or the sentence about the positive classes is encoded. The result is what ``data.conditions_file`` takes.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from common.checkpoint import write_json
from common.config import require_at_least, require_choice
from common.errors import ConfigError, DataError
from common.seeding import generator
from rpg.checkpoint_files import find_checkpoints, names_of
from rpg.image_condition import ImageEncoder, build_image_encoder, image_condition, list_images, read_image
from rpg.prompting import class_names
from rpg.tasks import NUM_CLASSES, task_bits, task_in_name
from rpg.text_condition import TextEncoder, text_condition
from rpg.zoo.digits import load_images

KINDS = ("image", "text")
DIGITS = "digits"
DEFAULT_TEMPLATE = "{classes}"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Options of ``python -m rpg.extract_conditions``."""

    checkpoints: str  # folder whose file names say the tasks: ..._class0793_...
    output: str  # JSON file to be written, for data.conditions_file
    kind: Literal["image", "text"] = "image"
    encoder: str = "digits"  # image: digits, timm:NAME, or a transformers model; text: a transformers model
    images: str = "digits"  # folder with one sub-folder per class, or digits: the embedded ones to train on
    examples: int = 5  # image: drawn for each positive class and checkpoint
    classes: Any = "cifar10"  # text: names of the ten classes: cifar10, digits, a text file, or a list
    template: str = DEFAULT_TEMPLATE  # text: sentence about {classes}, the positive ones
    pattern: str | None = None  # of the checkpoints' names; null: all
    seed: int = 0
    device: str | None = None  # null: the GPU, else the CPU
    overwrite: bool = False

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, KINDS)
        require_at_least("examples", self.examples, 1)
        require_at_least("seed", self.seed, 0)
        if self.kind == "text" and self.encoder == DIGITS:
            raise ConfigError("kind=text needs a language model: set encoder=FOLDER or a hub name of transformers.")
        if "{classes}" not in self.template:
            raise ConfigError(f"template={self.template!r} does not hold {{classes}}, where their names go.")


def extract_conditions(config: ExtractConfig) -> dict[str, list[float]]:
    """Writes the conditions and returns them by relative file name.

    Raises: DataError for names without a task, images that are missing, or an output that exists.
    """
    output = Path(config.output)
    if output.exists() and not config.overwrite:
        raise DataError(f"output={output} exists; choose another name, or replace it with overwrite=true.")
    folder = Path(config.checkpoints)
    names = names_of(find_checkpoints(folder, config.pattern), folder)
    if not names:
        raise DataError(f"checkpoints={folder} holds no checkpoints; give the folder that data.checkpoints names.")
    tasks = [_task_of(name) for name in names]
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    condition_of = _text_source(config, device) if config.kind == "text" else _image_source(config, device)
    table = {
        name: condition_of(task, index)
        for index, (name, task) in enumerate(
            zip(tqdm(names, unit="checkpoint", leave=False, disable=None), tasks, strict=True)
        )
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, table)
    return table


def _task_of(name: str) -> int:
    task = task_in_name(name)
    if task is None:
        raise DataError(f"{name} does not say its task; name checkpoints like 0001_acc0.9717_class0793_tag.pth.")
    return task


ConditionOf = Callable[[int, int], list[float]]


def _text_source(config: ExtractConfig, device: str) -> ConditionOf:
    names = class_names(config.classes)
    if len(names) != NUM_CLASSES:
        raise ConfigError(f"classes={config.classes} are {len(names)} names; tasks are over {NUM_CLASSES} classes.")
    encoder = TextEncoder(config.encoder, device)
    known: dict[int, list[float]] = {}

    def condition_of(task: int, _: int) -> list[float]:
        if task not in known:
            positive = ", ".join(name for name, bit in zip(names, task_bits(task), strict=True) if bit)
            known[task] = text_condition(encoder, config.template.replace("{classes}", positive)).tolist()
        return known[task]

    return condition_of


def _image_source(config: ExtractConfig, device: str) -> ConditionOf:
    encoder = build_image_encoder(config.encoder, device)
    examples = _digit_examples() if config.images == DIGITS else _folder_examples(Path(config.images))

    def condition_of(task: int, index: int) -> list[float]:
        chosen: list[Any] = []
        for label in (label for label, bit in enumerate(task_bits(task)) if bit):
            rng = generator(config.seed, "example images", index, label)
            places = torch.randperm(len(examples[label]), generator=rng)[: config.examples].tolist()
            chosen += [_opened(examples[label][place]) for place in places]
        return _mean(encoder, chosen)

    return condition_of


def _mean(encoder: ImageEncoder, images: Sequence[Any]) -> list[float]:
    return image_condition(encoder, images).tolist()


def _opened(example: Any) -> Any:
    return read_image(example) if isinstance(example, Path) else example


def _digit_examples() -> list[list[Any]]:
    images = load_images()
    return [list(images.train_N1HW[images.train_label_N == label]) for label in range(NUM_CLASSES)]


def _folder_examples(folder: Path) -> list[list[Path]]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if len(classes) != NUM_CLASSES:
        raise DataError(
            f"images={folder} has {len(classes)} sub-folders; it needs {NUM_CLASSES}, one of images per class, whose "
            "sorted names are in the order of the classes (0_airplane, 1_automobile, ...)."
        )
    return [list_images(path) for path in classes]
