"""Blocks of one token stream as a dataset.

Legend: ``B`` rows fetched, ``L`` block length, ``n`` blocks.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import ConfigError, DataError

TOKENS_PER_READ = 1 << 17  # 1 MB as int64


@dataclass(frozen=True)
class TextInfo:
    """What a packed corpus holds.

    Attributes:
        documents: texts read.
        tokens: all tokens, end-of-text tokens included.
        blocks: blocks of ``length`` tokens.
        dropped_tokens: tokens in no block: the remainder of the stream, or of every group.
        cache: folder of the token cache, None if held in memory.
    """

    name: str
    split: str
    length: int
    vocab_size: int
    documents: int
    tokens: int
    blocks: int
    dropped_tokens: int
    cache: str | None = None


@dataclass(frozen=True)
class TokenStream:
    """All tokens of a corpus in one array, and what was counted while they were made."""

    tokens: NDArray
    documents: int
    total_tokens: int  # before groups lost their remainders
    path: Path | None = None  # of the memory map

    @property
    def folder(self) -> str | None:
        return str(self.path.parent) if self.path else None


class TokenDataset(torch.utils.data.Dataset):
    """Blocks of L tokens of one stream: ``dataset[i] -> {"tokens": (L,) int64}``.

    ``fetch`` reads many rows at once without a Python loop. A pickled dataset (a loader's worker process) reopens the
    memory map instead of carrying the tokens.

    Raises:
        DataError: the corpus is shorter than one block.
    """

    def __init__(
        self, stream: TokenStream, length: int, *, vocab_size: int, name: str = "corpus", split: str = ""
    ) -> None:
        if length < 1:
            raise ConfigError(f"length={length} tokens per block must be at least 1.")
        blocks = len(stream.tokens) // length
        if blocks < 1:
            raise DataError(
                f"{name}{f' ({split})' if split else ''} holds {len(stream.tokens)} tokens in {stream.documents} "
                f"documents, fewer than one block of length={length}; use more text or a length of at most "
                f"{max(1, len(stream.tokens))}."
            )
        self.stream, self.length = stream, length
        self.info = TextInfo(
            name=name,
            split=split,
            length=length,
            vocab_size=vocab_size,
            documents=stream.documents,
            tokens=stream.total_tokens,
            blocks=blocks,
            dropped_tokens=stream.total_tokens - blocks * length,
            cache=stream.folder,
        )
        self._blocks_nL = stream.tokens[: blocks * length].reshape(blocks, length)

    def __len__(self) -> int:
        return len(self._blocks_nL)

    @property
    def rows_per_read(self) -> int:
        """Rows that are worth a message from a loader's worker process."""
        return max(1, TOKENS_PER_READ // self.length)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"tokens": torch.from_numpy(self._blocks_nL[row].astype(np.int64))}

    def __getitems__(self, rows: list[int]) -> list[dict[str, Tensor]]:
        return [{"tokens": tokens_L} for tokens_L in self.fetch(rows)["tokens"]]

    def fetch(self, rows: NDArray | Tensor | list[int]) -> dict[str, Tensor]:
        """``{"tokens": (B, L) int64}`` for B row numbers in any order."""
        return {"tokens": torch.from_numpy(self._blocks_nL[np.asarray(rows)].astype(np.int64))}

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        del state["_blocks_nL"]
        if self.stream.path is not None:
            state["stream"] = None
            state["map"] = (self.stream.tokens.dtype.str, self.stream.documents, self.stream.total_tokens)
            state["path"] = self.stream.path
        return state

    def __setstate__(self, state: dict) -> None:
        path = state.pop("path", None)
        if path is not None:
            dtype, documents, total_tokens = state.pop("map")
            state["stream"] = TokenStream(np.memmap(path, dtype=dtype, mode="r"), documents, total_tokens, path)
        self.__dict__.update(state)
        blocks = self.info.blocks
        self._blocks_nL = self.stream.tokens[: blocks * self.length].reshape(blocks, self.length)
