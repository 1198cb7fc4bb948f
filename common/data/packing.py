"""Packing: every document closed by end-of-text, all joined into one stream, the stream cut into blocks of L tokens.

Legend: ``L`` block length, ``n`` blocks.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError

TokenList = Sequence[int] | NDArray


def join_documents(token_lists: Iterable[TokenList], eos: int | None, dtype: np.dtype | type = np.int64) -> NDArray:
    """All documents one after the other, each followed by ``eos``; an empty document is a lone ``eos``.

    With ``eos`` None nothing separates them.
    """
    flat: list[int] = []
    for tokens in token_lists:
        flat.extend(tokens)
        if eos is not None:
            flat.append(eos)
    return np.array(flat, dtype=dtype)


class BlockPacker:
    """Packs documents as they arrive; how they are divided over calls of ``add`` does not change the blocks.

    Args:
        length: L, tokens per block.
        eos: end-of-text id, appended to every document; None: nothing separates documents.
        group_size: None joins everything into one stream whose remainder is dropped once. A number drops the remainder
            after every so many documents, as the reference does with 1000.

    Source: RADD's released data code packs inside batched maps of 1000 documents; one stream is ours.

    Raises:
        ConfigError: ``length`` or ``group_size`` below 1.
    """

    def __init__(
        self, length: int, eos: int | None, *, group_size: int | None = None, dtype: np.dtype | type = np.int64
    ) -> None:
        if length < 1:
            raise ConfigError(f"length={length} tokens per block must be at least 1.")
        if group_size is not None and group_size < 1:
            raise ConfigError(f"group_size={group_size} documents must be at least 1, or null for one stream.")
        self.length, self.eos, self.group_size, self.dtype = length, eos, group_size, np.dtype(dtype)
        self.dropped = 0  # tokens lost so far; ``finish`` adds the last remainder
        self._tail = np.empty(0, dtype=self.dtype)
        self._in_group = 0  # documents of the current group so far

    def add(self, token_lists: Sequence[TokenList]) -> NDArray:
        """Blocks ``(n, L)`` that are complete with these documents, possibly none."""
        if self.group_size is None:
            return self._cut(token_lists)
        blocks, start = [], 0
        while start < len(token_lists):
            end = start + self.group_size - self._in_group
            part = token_lists[start:end]
            blocks.append(self._cut(part))
            self._in_group += len(part)
            if self._in_group == self.group_size:
                self.finish()
            start = end
        return np.concatenate(blocks) if blocks else self._tail[:0].reshape(0, self.length)

    def finish(self) -> int:
        """Drops the unfinished block; returns all tokens dropped so far."""
        self.dropped += len(self._tail)
        self._tail = self._tail[:0]
        self._in_group = 0
        return self.dropped

    def state_dict(self) -> dict:
        return {"tail": self._tail.tolist(), "in_group": self._in_group, "dropped": self.dropped}

    def load_state_dict(self, state: dict) -> None:
        self._tail = np.array(state["tail"], dtype=self.dtype)
        self._in_group, self.dropped = state["in_group"], state["dropped"]

    def _cut(self, token_lists: Iterable[TokenList]) -> NDArray:
        stream = np.concatenate([self._tail, join_documents(token_lists, self.eos, self.dtype)])
        whole = len(stream) // self.length * self.length
        self._tail = stream[whole:].copy()  # a copy, so that the blocks can be freed
        return stream[:whole].reshape(-1, self.length)


def pack(
    token_lists: Iterable[TokenList], block: int, eos: int | None, *, group_size: int | None = None
) -> tuple[NDArray[np.int64], int]:
    """Blocks ``(n, block)`` of the joined documents, and the number of tokens dropped.

    Args:
        token_lists: token ids of each document, without end-of-text.
        block: tokens per block.
        eos: end-of-text id; None: nothing separates documents.
        group_size: see ``BlockPacker``.
    """
    packer = BlockPacker(block, eos, group_size=group_size)
    blocks = packer.add(list(token_lists))
    return blocks, packer.finish()
