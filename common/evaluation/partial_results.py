"""Long evaluations that survive a kill: finished items are appended to JSON-lines files, one per process.

Items are numbered; each is evaluated by one process. When the same command runs again, on any number of processes,
the items found on disk are not evaluated again. A file name holds a digest of everything that decides the values, so
results of another model, seed or option never mix.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import nn

from common.errors import ConfigError, DataError
from common.parallel import Parallel


def fingerprint(settings: Mapping) -> str:
    """Short digest of JSON-able settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def weights_digest(model: nn.Module) -> str:
    """Changes whenever a weight does."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


class PartialResults:
    """Finished items of one evaluation.

    Args:
        folder: where the files go; made if needed.
        name: of the evaluation, part of the file names.
        settings: everything that decides the values.
        parallel: this process among the others.

    Raises: ConfigError if the folder cannot be written.
    """

    def __init__(self, folder: Path | str, name: str, settings: Mapping, parallel: Parallel) -> None:
        self.folder, self.parallel = Path(folder), parallel
        self.stem = f"{name}_{fingerprint(settings)}"
        self._file: IO[str] | None = None
        self._mine: dict[int, dict] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"work_dir={folder} cannot be made ({error.strerror}); choose a folder you can write to."
            ) from None
        # read once, by one process: the others may be writing already when a late one looks
        self._found: dict[int, dict] = parallel.from_main(self._read() if parallel.is_main else None)

    @property
    def num_found(self) -> int:
        """Items that an earlier run has left."""
        return len(self._found)

    def pending(self, num_items: int) -> list[int]:
        """This process's share of the items that are not done."""
        todo = [item for item in range(num_items) if item not in self._found]
        return todo[self.parallel.rank :: self.parallel.world_size]

    def append(self, item: int, record: Mapping) -> None:
        """Keeps the record of a finished item, in memory and on disk.

        Raises: DataError if the disk is full; what was written before stays.
        """
        self._mine[item] = dict(record)
        try:
            if self._file is None:
                self._file = self._open()
            self._file.write(json.dumps({"item": item, **record}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            reason = "no space is left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
            raise DataError(
                f"{self._path(self.parallel.rank)} cannot be written ({reason}); free disk space and run the same "
                "command again, finished items are kept."
            ) from None

    def collect(self) -> dict[int, dict]:
        """Records of all items on all processes, in order of items. Collective."""
        self.close()
        merged = dict(self._found)
        for part in self.parallel.gather(self._mine):
            merged |= part
        return dict(sorted(merged.items()))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _path(self, rank: int) -> Path:
        return self.folder / f"{self.stem}.rank{rank}.jsonl"

    def _open(self) -> IO[str]:
        path = self._path(self.parallel.rank)
        with open(path, "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # a kill cut the last line off; it must not swallow the next one
                    file.write(b"\n")
        return open(path, "a", encoding="utf-8")

    def _read(self) -> dict[int, dict]:
        return dict(self._lines())

    def _lines(self) -> Iterator[tuple[int, dict]]:
        for path in sorted(self.folder.glob(f"{self.stem}.rank*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    record = json.loads(line)
                    yield int(record.pop("item")), record
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue  # the line that a kill cut off; its item is evaluated again
