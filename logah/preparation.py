"""Gets the data of later runs ready, once: downloads, tokenizers and token caches; and tells what is in them."""

from dataclasses import dataclass, field

from common.data.dataset import TokenDataset
from logah.data import DataSection, TrainingData, build_data


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Options of ``python -m logah.prepare``."""

    data: DataSection = field(default_factory=DataSection)


def prepare(config: PrepareConfig) -> str:
    """Builds the data as a run would and describes them; what exists already is only checked.

    Raises: ConfigError and DataError as ``build_data``.
    """
    return describe(build_data(config.data))


def describe(data: TrainingData) -> str:
    """Sizes of the splits, and what a network must fit."""
    return "\n".join(_describe_images(data) if data.kind == "vision" else _describe_text(data))


def _describe_images(data: TrainingData) -> list[str]:
    section = data.section
    is_apart = data.validation is not data.test
    return [
        f"{section.name}: images of 3 x {data.image_size} x {data.image_size}, {data.num_classes} classes",
        f"training    {data.num_train:>9,} images, augmentation {section.effective_augmentation}",
        f"validation  {len(data.validation):>9,} images{'' if is_apart else ', the test images'}",
        f"test        {len(data.test):>9,} images",
        f"epoch       {data.steps_per_epoch:>9,} steps of {data.batch_size} images",
    ]


def _describe_text(data: TrainingData) -> list[str]:
    section = data.section
    lines = [f"{section.name}: blocks of {data.block_size} tokens, vocabulary {data.vocab_size} ({section.tokenizer})"]
    for label, rows in (("training", data.train.rows), ("validation", data.validation), ("test", data.test)):
        facts = f"{label:<12}{len(rows):>9,} blocks"
        if isinstance(rows, TokenDataset):
            facts += f" of {rows.info.documents:,} documents, {rows.info.tokens:,} tokens"
            facts += f", {rows.info.cache}" if rows.info.cache and label == "training" else ""
        if label == "validation" and rows is data.test:
            facts += ", the test text"
        lines.append(facts)
    return [*lines, f"epoch       {data.steps_per_epoch:>9,} steps of {data.batch_size} blocks"]
