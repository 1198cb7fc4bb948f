"""The reproduction's data: scikit-learn's handwritten digits and Python's reference text, both embedded."""

import functools

from logah.data import DataSection, TrainingData, build_data
from logah.reproduction.settings import VISION, Settings


def data_section(settings: Settings, kind: str) -> DataSection:
    """Options as ``data.*`` of a training run.

    Digits: 8 x 8 pixels, 360 of 1797 held out. Text: byte-level BPE learnt from the training part, the held-out part
    being whole topics.
    """
    if kind == VISION:
        return DataSection(kind="vision", name="digits", batch_size=settings.vision_batch)
    return DataSection(
        kind="lm",
        name="embedded:topics",
        tokenizer=f"bpe:{settings.vocab_size}",
        batch_size=settings.language_batch,
        block_size=settings.block_size,
        limit_test=settings.held_out_blocks,
        cache_dir=None,
    )


@functools.lru_cache(maxsize=2)
def read_data(section: DataSection) -> TrainingData:
    """Read once per process: learning the tokenizer takes a second."""
    return build_data(section)


def data_of(settings: Settings, kind: str, seed: int) -> TrainingData:
    """The data in the order of ``seed``."""
    return read_data(data_section(settings, kind)).with_seed(seed)
