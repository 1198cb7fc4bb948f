"""Images of the ``datasets`` library and of webdataset shards, with random access to rows.

Rows must be reachable by number, because the order of a run is a permutation that can be resumed anywhere. Shards are
therefore indexed once by their tar headers, which reads no image.
"""

import glob
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from common.data.fingerprint import text_fingerprint
from common.data.hub import is_saved_dataset, load_hub_dataset, load_saved_dataset
from common.errors import ConfigError, DataError
from mup_dit.batches import Batch
from mup_dit.image_sources import IMAGE_SUFFIXES

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
CAPTION_COLUMNS = ("caption", "text", "prompt", "txt", "captions")
LABEL_KEYS, CAPTION_KEYS = (".cls",), (".txt", ".caption")


class HubSource:
    """Rows of a ``datasets.Dataset`` with an image column.

    Raises: DataError if no column holds images.
    """

    def __init__(self, name: str, dataset: Any) -> None:
        self.name, self._dataset = name, dataset
        columns = dataset.column_names
        self._image = next((column for column in IMAGE_COLUMNS if column in columns), None)
        if self._image is None:
            raise DataError(f"{name} has the columns {', '.join(columns)}; images must be in one of {IMAGE_COLUMNS}.")
        self._label = next((column for column in LABEL_COLUMNS if column in columns), None)
        self._caption = next((column for column in CAPTION_COLUMNS if column in columns), None)
        names = getattr(dataset.features[self._label], "names", None) if self._label else None
        self.classes = tuple(names) if names else None
        # decoded here and not by the library, so that one broken image is an error of its row only
        from datasets import Image as ImageFeature

        if isinstance(dataset.features[self._image], ImageFeature):
            self._dataset = dataset.cast_column(self._image, ImageFeature(decode=False))
        self._meta = dataset.select_columns([c for c in (self._label, self._caption) if c]) if self._has_meta else None

    @property
    def _has_meta(self) -> bool:
        return self._label is not None or self._caption is not None

    def __len__(self) -> int:
        return len(self._dataset)

    def where(self, row: int) -> str:
        return f"{self.name}, row {row}"

    def open(self, row: int) -> Image.Image:
        value = self._dataset[row][self._image]
        if isinstance(value, bytes):
            return Image.open(io.BytesIO(value))
        if value.get("bytes") is not None:
            return Image.open(io.BytesIO(value["bytes"]))
        return Image.open(value["path"])

    def label(self, row: int) -> int | None:
        return None if self._label is None else int(self._meta[row][self._label])

    def caption(self, row: int) -> str | None:
        if self._caption is None:
            return None
        value = self._meta[row][self._caption]
        return value[0] if isinstance(value, list) else value  # several captions of one image: the first

    def features(self, row: int) -> Batch | None:
        return None

    def latent(self, row: int) -> Batch | None:
        return None

    def fingerprint(self) -> str:
        return text_fingerprint("hub", self._dataset._fingerprint, len(self._dataset))


def hub_images(where: str, split: str) -> HubSource:
    """A hub name, a folder of ``save_to_disk``, or parquet files (a folder or a pattern).

    Raises: DataError if there is no such data set or split.
    """
    import datasets

    folder = Path(where)
    if folder.is_dir() and is_saved_dataset(folder):
        return HubSource(f"hf:{where}", load_saved_dataset(folder, split))
    pattern = str(folder / "**/*.parquet") if folder.is_dir() else where
    files = sorted(glob.glob(pattern, recursive=True)) if folder.is_dir() or where.endswith(".parquet") else []
    if files:
        # train-00000-of-00004.parquet, train/0000.parquet; without a split in the names all files are one part
        named = [name for name in files if split in Path(name).name or split in Path(name).parent.name]
        dataset = datasets.Dataset.from_parquet(named or files)
        return HubSource(f"hf:{where}", dataset)
    if folder.is_dir() or where.endswith(".parquet"):
        raise DataError(f"hf:{where} holds neither a saved data set nor parquet files.")
    return HubSource(f"hf:{where}", load_hub_dataset(where, None, split, cache_dir=None))


class _Member(NamedTuple):
    shard: int
    offset: int
    size: int


class ShardSource:
    """Samples of webdataset tar files: members that share a stem; an image with ``.cls``, ``.txt`` or ``.json``.

    A ``.json`` may hold ``label`` (or ``cls``) and ``caption`` (or ``prompt``, ``text``).

    Raises: DataError for a shard that is no tar file, or shards without images.
    """

    classes = None

    def __init__(self, name: str, shards: list[Path]) -> None:
        self.name, self._shards = name, shards
        self._images: list[_Member] = []
        self._stems: list[str] = []
        self._meta: dict[str, list[_Member | None]] = {"label": [], "caption": [], "json": []}
        for number, path in enumerate(shards):
            self._index(number, path)
        if not self._images:
            raise DataError(f"{name}: {len(shards)} shards without an image ({', '.join(IMAGE_SUFFIXES)}).")

    def _index(self, number: int, path: Path) -> None:
        samples: dict[str, dict[str, _Member]] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for entry in archive:
                    if entry.isfile():
                        stem, _, suffix = Path(entry.name).name.partition(".")
                        key = (Path(entry.name).parent / stem).as_posix()
                        member = _Member(number, entry.offset_data, entry.size)
                        samples.setdefault(key, {})[f".{suffix.lower()}"] = member
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"{path} is no readable, uncompressed tar file ({error}); copy it again.") from None
        for stem, members in samples.items():
            image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
            if image is None:
                continue
            self._images.append(image)
            self._stems.append(stem)
            for kind, suffixes in (("label", LABEL_KEYS), ("caption", CAPTION_KEYS), ("json", (".json",))):
                self._meta[kind].append(next((members[suffix] for suffix in suffixes if suffix in members), None))

    def __len__(self) -> int:
        return len(self._images)

    def where(self, row: int) -> str:
        return f"{self._shards[self._images[row].shard]}, {self._stems[row]}"

    def _bytes(self, member: _Member) -> bytes:
        with self._shards[member.shard].open("rb") as stream:
            stream.seek(member.offset)
            return stream.read(member.size)

    def open(self, row: int) -> Image.Image:
        return Image.open(io.BytesIO(self._bytes(self._images[row])))

    def label(self, row: int) -> int | None:
        found = self._value(row, "label", ("label", "cls"))
        try:
            return None if found is None else int(found)
        except (TypeError, ValueError):
            raise DataError(f"{self.where(row)}: label {found!r} is no class number.") from None

    def caption(self, row: int) -> str | None:
        found = self._value(row, "caption", ("caption", "prompt", "text"))
        return None if found is None else str(found)

    def _value(self, row: int, kind: str, names: tuple[str, ...]) -> Any:
        member = self._meta[kind][row]
        if member is not None:
            return self._bytes(member).decode("utf-8").strip()
        member = self._meta["json"][row]
        if member is None:
            return None
        try:
            record = json.loads(self._bytes(member))
        except ValueError as error:
            raise DataError(f"{self.where(row)}: its .json cannot be read ({error}).") from None
        return next((record[name] for name in names if record.get(name) is not None), None)

    def features(self, row: int) -> Batch | None:
        return None

    def latent(self, row: int) -> Batch | None:
        return None

    def fingerprint(self) -> str:
        sizes = [(path.name, os.path.getsize(path)) for path in self._shards]
        extents = np.array([(member.shard, member.offset, member.size) for member in self._images])
        return text_fingerprint("shards", sizes, extents.tobytes().hex())


def webdataset_shards(where: str, split: str) -> ShardSource:
    """Tar files of a folder or pattern; ``{0000..0012}`` is expanded. A folder may have one folder per split.

    Raises: DataError if no file matches.
    """
    from braceexpand import braceexpand

    if where.startswith(("http:", "https:", "pipe:", "s3:", "gs:")):
        raise ConfigError(f"webdataset:{where} is not on this machine; copy the shards here first.")
    folder = Path(where)
    if folder.is_dir():
        base = folder / split if (folder / split).is_dir() else folder
        shards = sorted(base.glob("*.tar"))
    else:
        shards = sorted({Path(match) for pattern in braceexpand(where) for match in glob.glob(pattern)})
    if not shards:
        raise DataError(f"webdataset:{where} matches no .tar file; give a folder or a pattern, such as 'data/*.tar'.")
    return ShardSource(f"webdataset:{where}", shards)
