"""A text encoder of a few kilobytes, for real captions without a download: a word tokenizer and a frozen table.

Dimensions: B captions, T tokens, Y channels.

Source: specification 7 (offline stand-in).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.errors import ConfigError
from common.seeding import generator

END, UNKNOWN = "</s>", "<unk>"
WORD = re.compile(r"\w+|[^\w\s]")


class SmallTextEncoder:
    """Captions -> rows of a fixed random table, one per word, then the end token's; the rest of the T tokens is zero.

    ``pooled`` is the sum of a caption's rows over the root of their number, so that its entries have variance 1 too.

    Args:
        words: the vocabulary; other words share one row.
        seed: of the table, whose entries are N(0, 1).
    """

    kind = "small"

    def __init__(self, words: Sequence[str], *, length: int = 8, channels: int = 32, seed: int = 0) -> None:
        if length < 1 or channels < 1:
            raise ConfigError(f"a text encoder of {length} tokens and {channels} channels; both must be at least 1.")
        self.words, self.length, self.channels, self.seed = tuple(words), length, channels, seed
        self.pooled_channels = channels
        self._ids = {word: index for index, word in enumerate((END, UNKNOWN, *self.words))}
        self._table_VY = torch.randn(len(self._ids), channels, generator=generator(seed, "small text encoder"))

    @classmethod
    def train(
        cls, captions: Iterable[str], *, length: int = 8, channels: int = 32, seed: int = 0
    ) -> "SmallTextEncoder":
        """The encoder whose vocabulary is the words of ``captions``."""
        words = {word for caption in captions for word in _split(caption)}
        return cls(sorted(words), length=length, channels=channels, seed=seed)

    def tokens(self, caption: str) -> list[int]:
        """At most T ids; the last one is always the end token's."""
        ids = [self._ids.get(word, self._ids[UNKNOWN]) for word in _split(caption)]
        return [*ids[: self.length - 1], self._ids[END]]

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """``caption`` float32 (B, 1, T, Y), ``mask`` int64 (B, T), ``pooled`` (B, Y)."""
        caption_BTY = torch.zeros(len(captions), self.length, self.channels)
        mask_BT = torch.zeros(len(captions), self.length, dtype=torch.int64)
        for row, caption in enumerate(captions):
            ids = self.tokens(caption)
            caption_BTY[row, : len(ids)] = self._table_VY[ids]
            mask_BT[row, : len(ids)] = 1
        pooled_BY = caption_BTY.sum(dim=1) / mask_BT.sum(dim=1, keepdim=True).sqrt()
        return {"caption": caption_BTY[:, None], "mask": mask_BT, "pooled": pooled_BY}

    def to_dict(self) -> dict[str, Any]:
        """What ``from_dict`` needs; JSON-able, a part of config.json."""
        return {
            "kind": self.kind,
            "words": list(self.words),
            "length": self.length,
            "channels": self.channels,
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> "SmallTextEncoder":
        given = {key: value for key, value in description.items() if key != "kind"}
        return cls(given.pop("words"), **given)


def _split(caption: str) -> list[str]:
    return WORD.findall(caption.lower())
