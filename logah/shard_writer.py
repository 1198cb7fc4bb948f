"""Safetensors files written tensor by tensor, or rows of a tensor at a time, in any order.

The layout follows from names, shapes and types alone, so every header is written before the first value exists, and no
more than a block of rows is ever held. Several files get the index that transformers looks for.

Source: the safetensors format (8 bytes with the header's length, a JSON header, the values without gaps).
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from common.checkpoint import sync, write_json
from common.errors import CheckpointError, ConfigError

INDEX_FILE = "model.safetensors.index.json"
GIGABYTE = 10**9
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of the types in a safetensors header."""


@dataclass(frozen=True)
class PlannedTensor:
    """What the layout of a file needs to know."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Sink(Protocol):
    """Takes tensors whole or in rows."""

    def write(self, name: str, value: Tensor, start: int = 0) -> None:
        """Takes ``value`` as the tensor's rows from ``start`` on; every row comes exactly once."""


class NullSink:
    """Counts what would be written: for timing and for plans of models that no disk here can hold."""

    def __init__(self) -> None:
        self.num_values = 0
        self.num_bytes = 0

    def write(self, name: str, value: Tensor, start: int = 0) -> None:
        del name, start
        self.num_values += value.numel()
        self.num_bytes += value.numel() * value.element_size()


@dataclass(frozen=True)
class Shard:
    """One file of the plan: its tensors in the order of their bytes."""

    file_name: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    def header(self, tied: Mapping[str, str]) -> bytes:
        """The file's first bytes, a multiple of 8.

        Args:
            tied: further names of tensors, each with the name it is stored under; those of this file are noted.
        """
        metadata = {"format": "pt"}  # transformers refuses files without it
        stored = {tensor.name for tensor in self.tensors}
        tied = {name: source for name, source in tied.items() if source in stored}
        if tied:
            metadata["tied"] = json.dumps(tied)
        entries: dict[str, object] = {"__metadata__": metadata}
        offset = 0
        for tensor in self.tensors:
            end = offset + tensor.num_bytes
            entries[tensor.name] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def plan_shards(tensors: Iterable[PlannedTensor], max_bytes: int) -> tuple[Shard, ...]:
    """Shares tensors out over files of at most ``max_bytes`` of values, in order; a larger tensor has its own file.

    Raises: ConfigError for a name that comes twice or a type that safetensors lacks.
    """
    groups: list[list[PlannedTensor]] = []
    seen: set[str] = set()
    size = 0
    for tensor in tensors:
        if tensor.name in seen or tensor.dtype not in DTYPES:
            why = "comes twice" if tensor.name in seen else f"has type {tensor.dtype}, which safetensors lacks"
            raise ConfigError(f"the tensor {tensor.name!r} {why}; give every tensor once, as floats or integers.")
        seen.add(tensor.name)
        if not groups or (size + tensor.num_bytes > max_bytes and groups[-1]):
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    # readers map the file and want every tensor at a multiple of its item size: the widest types come first
    orders = [tuple(sorted(group, key=lambda tensor: -tensor.dtype.itemsize)) for group in groups]
    if len(orders) <= 1:
        return tuple(Shard("model.safetensors", order) for order in orders)
    return tuple(
        Shard(f"model-{number:05d}-of-{len(orders):05d}.safetensors", order) for number, order in enumerate(orders, 1)
    )


class ShardWriter:
    """The files of a plan in ``folder``, which should be a temporary one (``common.folders.write_folder``).

    A file is synced to disk by a thread as soon as it is full, while the next is being filled.

    Raises: CheckpointError if the disk cannot take the files, at the start or at any time later.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], tied: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.shards = tuple(shards)
        self.tied = dict(tied or {})
        self._files: dict[str, FileIO] = {}
        self._places: dict[str, tuple[Shard, PlannedTensor, int]] = {}  # file, tensor, position of its first byte
        self._missing = {shard.file_name: shard.num_bytes for shard in self.shards}
        self._written: dict[str, int] = {}  # bytes by tensor
        self._syncing: list[Future] = []
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sync")
        self._check_space()

    def __enter__(self) -> "ShardWriter":
        try:
            for shard in self.shards:
                self._start(shard)
        except OSError as error:
            self.__exit__(error)
            raise self._failure(error) from None
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
            file.close()
        self._files.clear()

    @property
    def num_bytes(self) -> int:
        """Of all values."""
        return sum(shard.num_bytes for shard in self.shards)

    def write(self, name: str, value: Tensor, start: int = 0) -> None:
        """Puts ``value`` at the tensor's rows from ``start`` on; every row must come exactly once."""
        shard, tensor, position = self._places[name]
        rows = value.shape[0] if value.ndim else 1
        assert value.dtype == tensor.dtype and start + rows <= (tensor.shape[0] if tensor.shape else 1), name
        assert value.shape[1:] == tensor.shape[1:], f"{name}: rows of {value.shape[1:]} for {tensor.shape}"
        row_bytes = tensor.num_bytes // max(tensor.shape[0] if tensor.shape else 1, 1)
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        try:
            _write_all(self._file(shard), memoryview(data), position + start * row_bytes)
        except OSError as error:
            raise self._failure(error) from None
        self._written[name] = self._written.get(name, 0) + data.nbytes
        self._missing[shard.file_name] -= data.nbytes
        if self._missing[shard.file_name] == 0 and shard.file_name in self._files:
            self._syncing.append(self._pool.submit(_sync_and_close, self._files.pop(shard.file_name)))

    def finish(self) -> None:
        """Waits until every file is on disk and writes the index of several."""
        for shard in self.shards:
            for tensor in shard.tensors:
                written = self._written.get(tensor.name, 0)
                assert written == tensor.num_bytes, f"{tensor.name}: {written} of {tensor.num_bytes} bytes came"
        try:
            for done in self._syncing:
                done.result()
            if len(self.shards) > 1:
                write_json(self.folder / INDEX_FILE, self.index())
            sync(self.folder)
        except OSError as error:
            raise self._failure(error) from None

    def index(self) -> dict[str, object]:
        """Contents of the index: which file holds which tensor."""
        where = {tensor.name: shard.file_name for shard in self.shards for tensor in shard.tensors}
        return {"metadata": {"total_size": self.num_bytes}, "weight_map": where}

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < self.num_bytes:
            raise CheckpointError(
                f"out={self.folder.parent} has {free / GIGABYTE:.2f} GB left, the weights need "
                f"{self.num_bytes / GIGABYTE:.2f} GB; free disk space, choose another folder, or halve them with "
                "dtype=bf16."
            )

    def _start(self, shard: Shard) -> None:
        header = shard.header(self.tied)
        (self.folder / shard.file_name).write_bytes(header)
        position = len(header)
        for tensor in shard.tensors:
            self._places[tensor.name] = (shard, tensor, position)
            position += tensor.num_bytes

    def _file(self, shard: Shard) -> FileIO:
        """The open file; unbuffered, so that closing it after an error has nothing left to write."""
        if shard.file_name not in self._files:
            self._files[shard.file_name] = FileIO(self.folder / shard.file_name, "r+")
        return self._files[shard.file_name]

    def _failure(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"out: the weights could not be written ({error.strerror or error}); nothing was left behind. Free disk "
            "space or choose another folder."
        )


def _write_all(file: FileIO, data: memoryview, position: int) -> None:
    """Writes at ``position``; the system may take part of the bytes only."""
    file.seek(position)
    while data:
        data = data[file.write(data) :]


def _sync_and_close(file: FileIO) -> None:
    with file:
        os.fsync(file.fileno())
