"""LITPKDS files: fixed-size chunks of token ids on disk, the format of the 7B model's data (TinyLlama, lit-gpt).

A file is a header of 24 bytes (7 magic bytes, version, code of the number type, chunk size; little-endian, no padding)
and one chunk of tokens. ``PackedWriter`` writes the reference's bytes, ``PackedReader`` yields blocks in the
reference's order, and ``open_packed`` gives the same blocks to our loader, which shuffles and shards by itself:

    dataset = open_packed("slimpajama/train_*.bin", length=2049)
    loader = build_train_loader(dataset, global_size=960, micro_size=60, seed=0)

Dimensions: L block length, n blocks, B rows fetched.
"""

import bisect
import glob
import json
import os
import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.config import require_at_least
from common.data.dataset import TOKENS_PER_READ, TextInfo
from common.errors import ConfigError, DataError

MAGIC = b"LITPKDS"
VERSION = 1
HEADER = struct.Struct("<7sQBQ")  # magic, version, code of the number type, tokens in the chunk
CODES: dict[int, type] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float32,
    7: np.float64,
    8: np.uint16,
}
SMALL_VOCABULARY = 65500  # below it "auto" stores 16 bits, as the reference does
BUFFER_FILES = 8  # shuffled together by the reference's 7B run
FILE_NAME = "{prefix}_{number:010d}.bin"
STATE_FILE = ".prepare.json"  # what ``diffullama/preparation.py`` writes beside its files


# ---------------------------------------------------------------- one file


@dataclass(frozen=True)
class PackedFile:
    """What the header of one file says."""

    path: Path
    dtype: np.dtype
    chunk_size: int  # tokens

    def tokens(self) -> NDArray:
        """The chunk, mapped into memory."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", offset=HEADER.size, shape=(self.chunk_size,))

    def blocks(self, length: int) -> NDArray:
        """``(n, L)``; a tail shorter than ``length`` is in no block."""
        count = self.chunk_size // length
        return self.tokens()[: count * length].reshape(count, length)


def encode_header(dtype: np.dtype | type, chunk_size: int) -> bytes:
    """The 24 bytes before the tokens.

    Raises: ConfigError for a number type that the format has no code for.
    """
    for code, known in CODES.items():
        if np.dtype(dtype) == np.dtype(known):
            return HEADER.pack(MAGIC, VERSION, code, chunk_size)
    names = ", ".join(np.dtype(known).name for known in CODES.values())
    raise ConfigError(f"dtype={np.dtype(dtype).name} cannot be stored in packed files; use one of {names}.")


def read_header(path: str | Path) -> PackedFile:
    """Header of a file whose size fits what it announces.

    Raises: DataError if it is missing, not a packed file, of another version, cut off, or holds no whole numbers.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            data = stream.read(HEADER.size)
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give an existing packed file.") from error
    if data[: len(MAGIC)] != MAGIC:
        raise DataError(
            f"{path} is not a packed token file: it begins with {data[: len(MAGIC)]!r} instead of {MAGIC!r}. "
            "python -m diffullama.prepare format=packed writes such files."
        )
    if len(data) < HEADER.size:
        raise DataError(f"{path} is truncated: {len(data)} bytes are not a whole header; copy or prepare it again.")
    _, version, code, chunk_size = HEADER.unpack(data)
    if version != VERSION:
        raise DataError(f"{path} has version {version} of the packed format; only {VERSION} is known. Prepare it anew.")
    if code not in CODES:
        raise DataError(f"{path} has the unknown number type {code} (known: 1 to {max(CODES)}); prepare it anew.")
    dtype = np.dtype(CODES[code]).newbyteorder("<")
    if dtype.kind == "f":
        raise DataError(f"{path} holds {dtype.name} numbers, which are no token ids; prepare it with an integer type.")
    expected = HEADER.size + chunk_size * dtype.itemsize
    if size != expected:
        state = "truncated" if size < expected else "damaged"
        raise DataError(
            f"{path} is {state}: {size} bytes where its header announces {expected} ({chunk_size} tokens of "
            f"{dtype.name}); copy or prepare it again."
        )
    return PackedFile(path, dtype, chunk_size)


def dtype_for(vocab_size: int) -> np.dtype:
    """The reference's automatic number type: 16 bits for vocabularies below 65500, else 32. Golden ``packed_file``."""
    return np.dtype(np.uint16 if vocab_size < SMALL_VOCABULARY else np.int32)


# ---------------------------------------------------------------- writing


class PackedWriter:
    """Writes token arrays one after the other into files of ``chunk_size`` tokens.

        with PackedWriter("slimpajama", "train_slim", chunk_size=2049 * 1024, sep_token=2, vocab_size=32000) as writer:
            writer.add(ids)

    A file appears under its name when it is complete. ``close`` (or leaving the ``with`` block without an error) fills
    the last one with ``sep_token``; if nothing is left to write, no file of separators alone is added.

    Args:
        folder: created if missing.
        prefix: of the file names.
        chunk_size: tokens per file; a multiple of the block length loses nothing.
        sep_token: padding of the last file.
        dtype: a number type of the format, or "auto" by ``vocab_size``.
        first_file: number of the first file, to continue after others.

    Raises:
        ConfigError: sizes below 1, "auto" without a vocabulary size, a number type that the format lacks.
        DataError: a file of that name exists (nothing is overwritten), or an id does not fit the number type.
    """

    def __init__(
        self,
        folder: str | Path,
        prefix: str,
        *,
        chunk_size: int,
        sep_token: int,
        vocab_size: int | None = None,
        dtype: np.dtype | type | str = "auto",
        first_file: int = 0,
    ) -> None:
        require_at_least("chunk_size", chunk_size, 1)
        if isinstance(dtype, str) and dtype == "auto":
            if vocab_size is None:
                raise ConfigError("dtype='auto' of packed files needs vocab_size; give it, or a number type.")
            dtype = dtype_for(vocab_size)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.header = encode_header(dtype, chunk_size)
        self.folder, self.prefix, self.chunk_size, self.sep_token = Path(folder), prefix, chunk_size, sep_token
        self.files: list[Path] = []  # complete ones
        self.number = first_file
        self._check(np.array([sep_token]))
        self._chunk = np.full(chunk_size, sep_token, dtype=self.dtype)
        self._filled = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._refuse_existing()

    def add(self, tokens: Sequence[int] | NDArray | Tensor) -> int:
        """Appends token ids; returns the number of files that became complete."""
        array = np.asarray(tokens).reshape(-1)
        self._check(array)
        before, start = len(self.files), 0
        while start < len(array):
            part = array[start : start + self.chunk_size - self._filled]
            self._chunk[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            start += len(part)
            if self._filled == self.chunk_size:
                self._write()
        return len(self.files) - before

    @property
    def pending(self) -> int:
        """Tokens that are in no complete file yet."""
        return self._filled

    def close(self) -> list[Path]:
        """Writes what is left, padded; returns all files written."""
        if self._filled:
            self._chunk[self._filled :] = self.sep_token
            self._write()
        return self.files

    def __enter__(self) -> "PackedWriter":
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        if error_type is None:
            self.close()

    def _path(self, number: int) -> Path:
        return self.folder / FILE_NAME.format(prefix=self.prefix, number=number)

    def _refuse_existing(self) -> None:
        """Raises DataError if the next file's name, or a later one of this prefix, is taken."""
        first = self._path(self.number)
        taken = [path for path in sorted(self.folder.glob(f"{glob.escape(self.prefix)}_*.bin")) if path >= first]
        if taken:
            raise DataError(
                f"{taken[0]} exists and is not overwritten; choose another folder or prefix, or remove the "
                f"{len(taken)} packed file{'s' if len(taken) > 1 else ''} first."
            )

    def _check(self, array: NDArray) -> None:
        limits = np.iinfo(self.dtype) if self.dtype.kind in "iu" else None
        if limits is not None and len(array) and (array.min() < limits.min or array.max() > limits.max):
            worst = array.max() if array.max() > limits.max else array.min()
            raise DataError(
                f"token id {worst} does not fit {self.dtype.name} ({limits.min}..{limits.max}); choose a wider number "
                "type, or check that tokenizer and vocab_size belong together."
            )

    def _write(self) -> None:
        path = self._path(self.number)
        if path.exists():
            raise DataError(f"{path} appeared while it was being prepared; two programs write to the same folder.")
        temporary = path.with_name(f".{path.name}.part")
        with temporary.open("wb") as stream:
            stream.write(self.header)
            stream.write(self._chunk.tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(temporary, path)
        self.files.append(path)
        self.number += 1
        self._filled = 0


# ---------------------------------------------------------------- finding files


def find_packed(pattern: str | Path | Sequence[str | Path]) -> list[Path]:
    """Packed files of a folder, a file, a glob pattern, or a list of these; sorted by name within each.

    Raises: DataError if there is none, or a folder is still being prepared.
    """
    if not isinstance(pattern, str | Path):
        return [path for one in pattern for path in find_packed(one)]
    path = Path(pattern).expanduser()
    if path.is_dir():
        _refuse_unfinished(path)
        found = sorted(path.glob("*.bin"))
    elif path.is_file():
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(str(path)))
    if not found:
        raise DataError(
            f"No packed file at {str(pattern)!r} (from {Path.cwd()}); give a folder that holds *.bin files, or a "
            "pattern such as slimpajama/train_*.bin. python -m diffullama.prepare format=packed writes them."
        )
    return found


def _refuse_unfinished(folder: Path) -> None:
    state = folder / STATE_FILE
    if state.exists() and not json.loads(state.read_text()).get("complete"):
        raise DataError(
            f"{folder} is not prepared to its end; run the same python -m diffullama.prepare again, or give a pattern "
            "of the files to use."
        )


def files_of_rank(paths: Sequence[Path], rank: int = 0, world_size: int = 1, seed: int | None = None) -> list[Path]:
    """The files one process reads in the reference: shuffled with Python's generator, then every W-th.

    Args:
        seed: None keeps the order. The reference seeds every source with the same number.

    Source: specification 7; the remainder of the division by W is left out there too.
    """
    paths = list(paths)
    if seed is not None:
        random.Random(seed).shuffle(paths)
    usable = len(paths) // world_size * world_size
    return paths[rank:usable:world_size]


# ---------------------------------------------------------------- reading in the reference's order


class PackedReader:
    """Blocks of ``length`` tokens in the reference's order; a loop that was stopped continues where it was.

    Files are taken in groups; a group's blocks come in order, or permuted by one numpy generator that runs on over the
    groups (``default_rng``: the frozen case's order, though its description says ``RandomState``). A file's tail
    shorter than a block is skipped. A last group with fewer files is read as well, where the reference drops it, or
    fails if it is the only one.

    Args:
        paths: this process's files in order (``files_of_rank``).
        n_chunks: files of a group.
        seed: of the permutations; None does not shuffle.
        wrap: start again after the last group, with the generator running on.

    Raises: ConfigError for sizes below 1, DataError as ``read_header``, or if no file holds a block.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        length: int,
        *,
        n_chunks: int = BUFFER_FILES,
        seed: int | None = None,
        wrap: bool = False,
    ) -> None:
        require_at_least("length", length, 1)
        require_at_least("n_chunks", n_chunks, 1)
        self.files = [read_header(path) for path in paths]
        self.length, self.n_chunks, self.seed, self.wrap = length, n_chunks, seed, wrap
        self._counts = [file.chunk_size // length for file in self.files]
        if not sum(self._counts):
            raise DataError(f"{len(self.files)} packed files hold no block of {length} tokens; use a smaller length.")
        self.position = 0  # blocks yielded

    def __iter__(self) -> Iterator[NDArray]:
        passed = 0
        for group, order in self._groups():
            if passed + len(order) > self.position:
                blocks = [self.files[index].blocks(self.length) for index in group]
                first_of = np.cumsum([0, *map(len, blocks)])
                for number in order[self.position - passed :]:
                    file = int(np.searchsorted(first_of, number, side="right")) - 1
                    self.position += 1
                    yield blocks[file][number - first_of[file]]
            passed += len(order)

    def _groups(self) -> Iterator[tuple[range, NDArray]]:
        """File numbers of each group, and the order of its blocks."""
        shuffle = None if self.seed is None else np.random.default_rng(self.seed)
        while True:
            for start in range(0, len(self.files), self.n_chunks):
                group = range(start, min(start + self.n_chunks, len(self.files)))
                count = sum(self._counts[index] for index in group)
                yield group, np.arange(count) if shuffle is None else shuffle.permutation(count)
            if not self.wrap:
                return

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = int(state["position"])


# ---------------------------------------------------------------- for our loader


class PackedDataset(torch.utils.data.Dataset):
    """Blocks of packed files as rows: ``dataset[i] -> {"tokens": (L,) int64}``, the interface of ``TokenDataset``.

    Files are opened when they are first read and stay mapped; a pickled dataset (a loader's worker) maps them anew.

    Raises: ConfigError for a length below 1, DataError as ``read_header``, or if no file holds a block.
    """

    def __init__(self, files: Sequence[PackedFile], length: int, *, name: str = "packed", split: str = "") -> None:
        require_at_least("length", length, 1)
        self.files, self.length = list(files), length
        counts = [file.chunk_size // length for file in self.files]
        self._first_F = [0, *np.cumsum(counts).tolist()]  # number of each file's first block
        tokens = sum(file.chunk_size for file in self.files)
        if not self._first_F[-1]:
            longest = max((file.chunk_size for file in self.files), default=0)
            raise DataError(
                f"{name}: {len(self.files)} packed files hold no block of length={length}; a file has at most "
                f"{longest} tokens. Use a smaller length, or prepare with a larger chunk_size."
            )
        self.info = TextInfo(
            name=name,
            split=split,
            length=length,
            vocab_size=0,  # the format does not say
            documents=0,
            tokens=tokens,
            blocks=self._first_F[-1],
            dropped_tokens=tokens - self._first_F[-1] * length,
        )
        self._mapped: dict[int, NDArray] = {}

    def __len__(self) -> int:
        return self._first_F[-1]

    @property
    def rows_per_read(self) -> int:
        """Rows that are worth a message from a loader's worker process."""
        return max(1, TOKENS_PER_READ // self.length)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"tokens": self.fetch([row])["tokens"][0]}

    def fetch(self, rows: NDArray | Tensor | Sequence[int]) -> dict[str, Tensor]:
        """``{"tokens": (B, L) int64}`` for B row numbers in any order."""
        rows_B = np.asarray(rows, dtype=np.int64)
        if len(rows_B) and (rows_B.min() < 0 or rows_B.max() >= len(self)):
            raise IndexError(f"rows {rows_B.min()}..{rows_B.max()} of a dataset with {len(self)} rows")
        tokens_BL = np.empty((len(rows_B), self.length), dtype=np.int64)
        for place in np.argsort(rows_B, kind="stable"):  # file after file
            row = int(rows_B[place])
            file = bisect.bisect_right(self._first_F, row) - 1
            tokens_BL[place] = self._blocks(file)[row - self._first_F[file]]
        return {"tokens": torch.from_numpy(tokens_BL)}

    def _blocks(self, file: int) -> NDArray:
        if file not in self._mapped:
            self._mapped[file] = self.files[file].blocks(self.length)
        return self._mapped[file]

    def largest_id(self, rows: int = 256) -> int:
        """Largest id among evenly spaced rows: a quick comparison with a model's vocabulary."""
        sample = np.unique(np.linspace(0, len(self) - 1, min(rows, len(self))).astype(np.int64))
        return int(self.fetch(sample)["tokens"].max())

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_mapped": {}}


def open_packed(
    folder: str | Path | Sequence[str | Path],
    length: int,
    *,
    vocab_size: int | None = None,
    name: str | None = None,
    split: str = "",
) -> PackedDataset:
    """Blocks of ``length`` tokens of the packed files in a folder (or of a file, pattern, or list of these).

    Args:
        length: L; one more than the model's context for the 7B recipe, whose last token is a label only.
        vocab_size: checked against a sample of the ids, where given.

    Raises:
        ConfigError: a length below 1.
        DataError: no file, or one that ``read_header`` refuses; ids outside the vocabulary.
    """
    label = name or (Path(folder).name if isinstance(folder, str | Path) else "packed")
    dataset = PackedDataset([read_header(path) for path in find_packed(folder)], length, name=label, split=split)
    if vocab_size is not None and (largest := dataset.largest_id()) >= vocab_size:
        raise DataError(
            f"{label} holds token id {largest}, outside the model's vocabulary 0..{vocab_size - 1}; it was prepared "
            "with another tokenizer."
        )
    return dataset
