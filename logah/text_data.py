"""Text of one split as blocks of tokens.

Dimensions: L tokens of a block.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from common.data.cache import TokenRecipe, load_or_build_tokens
from common.data.corpora import CORPORA, build_text_dataset, load_data_tokenizer, open_source, parse_name
from common.data.dataset import TokenDataset
from common.data.detokenizers import find_detokenizer
from common.data.fingerprint import text_fingerprint
from common.data.hub import HubDataset
from common.data.sources import Source
from common.data.tokenizer import Tokenizer
from common.errors import DataError
from logah.data_config import DataSection


@dataclass(frozen=True)
class Texts:
    """Blocks of the three splits and the tokenizer that made them."""

    train: TokenDataset
    validation: TokenDataset
    test: TokenDataset
    tokenizer: Tokenizer


class PartOfSource:
    """The documents of ``source`` that are marked, in its order.

    Args:
        is_in_N: whether each document belongs to the part.
        description: of how the part was chosen; enters the fingerprint.
    """

    def __init__(self, source: Source, is_in_N: np.ndarray, description: str) -> None:
        self.source, self.is_in_N, self.description = source, is_in_N, description
        self.label, self.num_documents = f"{source.label}-{description}", int(is_in_N.sum())

    def documents(self) -> Iterator[str]:
        """Texts of this part."""
        for is_in, text in zip(self.is_in_N, self.source.documents(), strict=True):
            if is_in:
                yield text

    def fingerprint(self) -> str:
        """Changes with the documents and with the choice."""
        return text_fingerprint("part", self.source.fingerprint(), self.description)


def divide(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """A source without a random ``share`` of its documents, and those documents.

    They are the ones that ``datasets.Dataset.train_test_split(test_size=share, seed=seed)`` takes, which is how
    OpenWebText gets its usual test part; each part keeps the order of the source.

    Raises: DataError if a part would be empty.
    """
    total = source.num_documents
    if total is None:
        total = sum(1 for _ in source.documents())
    count = math.ceil(share * total)
    if not 0 < count < total:
        raise DataError(
            f"data.held_out={share} of the {total} documents of {source.label} leaves a part without documents; choose "
            "another share, or name the validation text with data.valid."
        )
    is_held_out_N = np.zeros(total, dtype=bool)
    is_held_out_N[np.random.default_rng(seed).permutation(total)[:count]] = True
    names = f"without-{share:g}-{seed}", f"held-out-{share:g}-{seed}"
    if isinstance(source, HubDataset):  # rows are addressed, so that the small part costs little
        numbers = np.flatnonzero(~is_held_out_N), np.flatnonzero(is_held_out_N)
        rest, held_out = [
            HubDataset(source.dataset.select(rows), fields=(source.field,), label=f"{source.label}-{name}")
            for rows, name in zip(numbers, names, strict=True)
        ]
        return rest, held_out
    return PartOfSource(source, ~is_held_out_N, names[0]), PartOfSource(source, is_held_out_N, names[1])


def open_texts(section: DataSection) -> Texts:
    """Blocks to train, validate and test on.

    Without a validation (test) split of its own a text is validated (tested) on the other held-out one; with
    ``held_out`` a random share of the training documents is both.

    Raises: ConfigError and DataError for names, files and sizes that cannot be used.
    """
    tokenizer = load_data_tokenizer(
        section.tokenizer,
        section.name,
        cache_dir=section.cache_dir,
        detokenizer=section.detokenizer,
        text_unit=section.text_unit,
    )
    if section.held_out:
        source = open_source(section.name, "train", cache_dir=section.cache_dir, text_unit=section.text_unit)
        rest, held_out = divide(source, section.held_out, section.held_out_seed)
        train = _read_source(section, rest, tokenizer, "train")
        tests = _read_source(section, held_out, tokenizer, "test")
        return Texts(train, tests, tests, tokenizer)
    _require_held_out(section)
    read = _Reader(section, tokenizer)
    train = read(section.name, "train")
    valid, test = validated_name(section), tested_name(section)
    return Texts(train, read(valid, _available(valid, "validation")), read(test, _available(test, "test")), tokenizer)


def _require_held_out(section: DataSection) -> None:
    """Raises DataError if a file, or a folder without splits, would be validated or tested on what it trains."""
    if parse_name(section.name).kind != "path":
        return
    options = {"cache_dir": section.cache_dir, "text_unit": section.text_unit}
    trained = open_source(section.name, "train", **options).fingerprint()
    for option, name, split in (
        ("valid", validated_name(section), "validation"),
        ("test", tested_name(section), "test"),
    ):
        if parse_name(name).kind == "path" and open_source(name, split, **options).fingerprint() == trained:
            raise DataError(
                f"data.{option}={getattr(section, option)}: the {split} text would be the training text "
                f"{section.name}; name another with data.{option}=FILE, or hold out a share of it with "
                "data.held_out=0.05."
            )


def validated_name(section: DataSection) -> str:
    """The text whose validation part is read."""
    return section.valid or section.name


def tested_name(section: DataSection) -> str:
    """The text whose test part is read."""
    return section.test or validated_name(section)


class _Reader:
    """Reads a split of a text; the same split is read once."""

    def __init__(self, section: DataSection, tokenizer: Tokenizer) -> None:
        self.section, self.tokenizer = section, tokenizer
        self._known: dict[tuple[str, str], TokenDataset] = {}

    def __call__(self, name: str, split: str) -> TokenDataset:
        if parse_name(name).kind == "embedded" and split == "validation":
            split = "test"  # the embedded text has two splits
        if (name, split) not in self._known:
            section = self.section
            self._known[name, split] = build_text_dataset(
                name,
                split,
                length=section.block_size,
                tokenizer=self.tokenizer,
                cache_dir=section.cache_dir,
                detokenizer=section.detokenizer,
                group_size=section.group_size,
                text_unit=section.text_unit,
                end_of_text=section.end_of_text,
            )
        return self._known[name, split]


def _available(name: str, split: str) -> str:
    """``split``, or the other held-out split where a known corpus lacks it (its own error follows where both do)."""
    corpus = CORPORA.get(parse_name(name).name) if parse_name(name).kind == "corpus" else None
    if corpus is None or split in corpus.splits:
        return split
    other = {"validation": "test", "test": "validation"}[split]
    return other if other in corpus.splits else split


def _read_source(section: DataSection, source: Source, tokenizer: Tokenizer, split: str) -> TokenDataset:
    label, transform = find_detokenizer(section.detokenizer, parse_name(section.name).name)
    recipe = TokenRecipe(
        source=source,
        tokenizer=tokenizer,
        transform=transform,
        transform_name=label,
        group_size=section.group_size,
        length=section.block_size if section.group_size else None,
        end_of_text=section.end_of_text,
    )
    stream = load_or_build_tokens(recipe, section.cache_dir)
    return TokenDataset(stream, section.block_size, vocab_size=tokenizer.vocab_size, name=section.name, split=split)
