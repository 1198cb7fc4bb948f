"""Tokens of all checkpoints in one memory map: written once, in one pass, then only read, by any number of processes.

Dimensions: K checkpoints, L tokens of each, D values of a token, R rows asked for.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.data.fingerprint import file_fingerprint
from common.errors import DataError
from rpg.codec import TokenCodec

TOKENS_FILE, STORE_FILE = "tokens.bin", "store.json"
FORMAT = 1


class TokenStore:
    """Tokens (K, L, D) float32, in memory or mapped from a file, which processes that it is sent to map themselves."""

    def __init__(self, tokens_KLD: NDArray[np.float32] | Tensor, path: Path | None = None) -> None:
        self._tokens_KLD = tokens_KLD.numpy() if isinstance(tokens_KLD, Tensor) else tokens_KLD
        self._path = path

    @classmethod
    def open(cls, path: Path, shape: tuple[int, int, int]) -> "TokenStore":
        """Maps a file of these tokens, read-only."""
        return cls(np.memmap(path, dtype=np.float32, mode="r", shape=shape), path)

    def __getstate__(self) -> dict[str, object]:
        if self._path is None:
            return {"tokens": self._tokens_KLD}
        return {"path": self._path, "shape": self._tokens_KLD.shape}

    def __setstate__(self, state: Mapping) -> None:
        other = TokenStore.open(state["path"], state["shape"]) if "path" in state else TokenStore(state["tokens"])
        self.__dict__.update(other.__dict__)

    def __len__(self) -> int:
        return self._tokens_KLD.shape[0]

    @property
    def num_tokens(self) -> int:
        return self._tokens_KLD.shape[1]

    @property
    def dim(self) -> int:
        return self._tokens_KLD.shape[2]

    @property
    def path(self) -> Path | None:
        """The mapped file; None if the tokens are in memory."""
        return self._path

    def gather(self, network_R: Tensor, token_R: Tensor) -> Tensor:
        """Tokens (R, D) of the given networks and places, a copy."""
        rows_R = network_R.to(torch.int64).cpu() * self.num_tokens + token_R.to(torch.int64).cpu()
        flat = self._tokens_KLD.reshape(-1, self.dim)
        return torch.from_numpy(np.ascontiguousarray(flat[rows_R.numpy()]))

    def network(self, index: int) -> Tensor:
        """All tokens (L, D) of one network, a copy."""
        index = range(len(self))[index]
        if self._path is None:
            return torch.from_numpy(np.array(self._tokens_KLD[index]))
        # read, not copied from the map: pages of a map that were touched stay in this process's memory
        size = self.num_tokens * self.dim
        values = np.fromfile(self._path, dtype=np.float32, count=size, offset=4 * index * size)
        return torch.from_numpy(values).view(self.num_tokens, self.dim)


def write_store(folder: Path, states: Iterable[Mapping[str, Tensor]], codec: TokenCodec, source: str) -> int:
    """Encodes checkpoints one after the other into ``folder``; one of them is in memory at a time.

    Args:
        source: digest of the manifest that they come from.

    Returns: how many there were.
    """
    tokens_LD = torch.empty(codec.num_tokens, codec.dim)
    count = 0
    with (folder / TOKENS_FILE).open("wb") as stream:
        for state in states:
            codec.encode(state, out=tokens_LD)
            stream.write(memoryview(tokens_LD.numpy()).cast("B"))
            count += 1
        stream.flush()
        os.fsync(stream.fileno())
    facts = {
        "format": FORMAT,
        "source": source,
        "shape": [count, codec.num_tokens, codec.dim],
        "fingerprint": file_fingerprint(folder / TOKENS_FILE),
    }
    (folder / STORE_FILE).write_text(json.dumps(facts, indent=1))
    return count


def open_store(folder: Path, source: str) -> TokenStore:
    """The store in ``folder``.

    Raises: DataError if it is absent, damaged, or made from other checkpoints than ``source`` says.
    """
    path = folder / TOKENS_FILE
    try:
        facts = json.loads((folder / STORE_FILE).read_text())
        shape = tuple(facts["shape"])
        if facts["format"] != FORMAT or facts["source"] != source:
            raise DataError(f"{folder} holds the tokens of other checkpoints.")
        if path.stat().st_size != 4 * int(np.prod(shape)) or file_fingerprint(path) != facts["fingerprint"]:
            raise DataError(f"{path} is damaged: its contents have changed since it was written.")
        return TokenStore.open(path, shape)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder} holds no tokens ({type(error).__name__}: {error}).") from None
