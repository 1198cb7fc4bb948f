"""Which checkpoints a token cache was made from: sorted names and content digests, in a versioned JSON file.

The order of the files decides which checkpoint is number k, so it is recorded and never taken from the file system.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common.errors import DataError
from rpg.adapters import CONFIG_FILE, weight_file

FORMAT = 1
MANIFEST_FILE = "manifest.json"
RACY_SECONDS = 2.0  # a file changed this shortly before the last check could have changed again in the same clock tick
SHOWN = 5  # names of one kind in a message


@dataclass(frozen=True)
class FileEntry:
    """One checkpoint: its contents by digest, and the file system's facts that spare reading it again.

    Attributes:
        name: relative path with forward slashes; of an adapter, its folder's.
        stamp: size, time of modification and of inode change of each file (ns).
    """

    name: str
    bytes: int
    sha256: str
    stamp: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class Changes:
    """Names of checkpoints that differ between two manifests."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    def __str__(self) -> str:
        parts = []
        for kind in ("added", "removed", "changed"):
            names: tuple[str, ...] = getattr(self, kind)
            if names:
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                parts.append(f"{kind}: {', '.join(names[:SHOWN])}{more}")
        return "; ".join(parts) or "no change"


@dataclass(frozen=True)
class Manifest:
    """The checkpoints in their order.

    Attributes:
        checked_ns: when ``stamp`` was taken.
        adapter_config: of PEFT adapters, the options that all of them share.
    """

    files: tuple[FileEntry, ...]
    checked_ns: int = 0
    adapter_config: Mapping[str, object] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.files)

    @property
    def digest(self) -> str:
        """Identifies names, order and contents."""
        lines = "\n".join(f"{entry.name}\0{entry.sha256}" for entry in self.files)
        return hashlib.sha256(f"{FORMAT}\n{lines}".encode("utf-8", errors="surrogatepass")).hexdigest()

    def changes_since(self, older: "Manifest") -> Changes:
        """What was added, removed or changed after ``older``."""
        before = {entry.name: entry.sha256 for entry in older.files}
        now = {entry.name: entry.sha256 for entry in self.files}
        return Changes(
            tuple(name for name in now if name not in before),
            tuple(name for name in before if name not in now),
            tuple(name for name in now if name in before and now[name] != before[name]),
        )

    def save(self, folder: Path) -> None:
        """Writes ``manifest.json`` in one step."""
        facts = {"format": FORMAT, "digest": self.digest, "checked_ns": self.checked_ns}
        facts |= {"files": [asdict(entry) for entry in self.files], "adapter_config": self.adapter_config}
        temporary = folder / f".{MANIFEST_FILE}.{os.getpid()}"
        temporary.write_text(json.dumps(facts, indent=1))
        os.replace(temporary, folder / MANIFEST_FILE)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Raises: DataError if it is damaged or of another version; FileNotFoundError if there is none."""
        path = folder / MANIFEST_FILE
        try:
            facts = json.loads(path.read_text())
            if facts["format"] != FORMAT:
                raise DataError(
                    f"{path} has format {facts['format']}, this version reads {FORMAT}; delete {folder}, it is made "
                    "again."
                )
            files = tuple(
                FileEntry(item["name"], item["bytes"], item["sha256"], tuple(map(tuple, item["stamp"])))
                for item in facts["files"]
            )
            manifest = cls(files, facts["checked_ns"], facts["adapter_config"])
            if manifest.digest != facts["digest"]:
                raise ValueError("its digest does not fit its list")
        except FileNotFoundError:
            raise
        except DataError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}); delete {folder}, it is made again.") from None
        return manifest


def compute_manifest(
    paths: Sequence[Path],
    names: Sequence[str],
    known: Manifest | None = None,
    adapter_config: Mapping[str, object] | None = None,
) -> Manifest:
    """Digests of the checkpoints in the given order.

    A file whose size and times are those that ``known`` holds is not read again, unless it was changed just before
    that check. A copied folder has other times: its files are read, and found equal.
    """
    before = {entry.name: entry for entry in known.files} if known is not None else {}
    started = time.time_ns()
    trusted_before = known.checked_ns - int(RACY_SECONDS * 1e9) if known is not None else 0
    entries = []
    for path, name in zip(paths, names):
        files = _files_of(path)
        stats = [file.stat() for file in files]
        stamp = tuple((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)
        old = before.get(name)
        if old is not None and old.stamp == stamp and all(max(times[1:]) < trusted_before for times in stamp):
            entries.append(old)
        else:
            entries.append(FileEntry(name, sum(stat.st_size for stat in stats), _sha256(files), stamp))
    return Manifest(tuple(entries), started, adapter_config)


def _files_of(path: Path) -> list[Path]:
    return [weight_file(path), path / CONFIG_FILE] if path.is_dir() else [path]


def _sha256(files: Sequence[Path]) -> str:
    digests = []
    for file in files:
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
