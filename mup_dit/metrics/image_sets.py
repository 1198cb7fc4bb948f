"""Images to be scored, wherever they are: ``.npz`` files, folders, webdataset shards, data sets by name.

A set is read in batches of consecutive images; with several processes each takes every W-th batch.

Dimensions: B images; H, W rows and columns of pixels; C channels.
"""

import io
import json
import logging
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from common.config import require_choice
from common.errors import DataError
from mup_dit.batches import ON_ERROR
from mup_dit.datasets import KINDS, build_dataset
from mup_dit.image_files import read_image, to_uint8

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MANIFEST = "manifest.jsonl"
DEFAULT_SIDE, DIGIT_SIDE = 256, 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageBatch:
    """Consecutive images; ``files`` names each within its set."""

    indices: list[int]
    images: list[NDArray[np.uint8]]
    files: list[str]


Batches = Iterator[ImageBatch]


class ImageSet(Protocol):
    """Images in a fixed order."""

    name: str

    def __len__(self) -> int: ...

    def batches(self, size: int, rank: int = 0, world_size: int = 1) -> Batches: ...


@dataclass
class FolderImages:
    """Image files of a folder, in the order of its manifest or of their names.

    Attributes:
        on_error: a missing or broken file ``stop``s, or is left out with a warning (``skip``).
        skipped: files left out so far.
    """

    name: str
    folder: Path
    files: list[str]
    on_error: str = "stop"
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, size: int, rank: int = 0, world_size: int = 1) -> Batches:
        for first in range(rank * size, len(self.files), world_size * size):
            found = []
            for index in range(first, min(first + size, len(self.files))):
                try:
                    found.append((index, read_image(self.folder / self.files[index])))
                except DataError as error:
                    if self.on_error == "stop":
                        raise
                    self.skipped.append(self.files[index])
                    logger.warning("left out: %s", error)
            if found:
                indices = [index for index, _ in found]
                yield ImageBatch(indices, [image for _, image in found], [self.files[index] for index in indices])


class NpzImages:
    """``arr_0`` of an ``.npz`` file, uint8 ``(N, H, W, C)``, read as a stream.

    Raises: DataError for a file without such an array.
    """

    def __init__(self, path: Path) -> None:
        self.name, self.path = str(path), path
        with self._stream() as stream:
            self.shape = _read_header(stream, path)

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int, rank: int = 0, world_size: int = 1) -> Batches:
        count, *shape = self.shape
        image_bytes = int(np.prod(shape))
        with self._stream() as stream:
            _read_header(stream, self.path)
            for number, first in enumerate(range(0, count, size)):
                length = min(size, count - first)
                data = stream.read(length * image_bytes)
                if len(data) < length * image_bytes:
                    raise DataError(f"{self.path} ends at image {first + len(data) // image_bytes} of {count}.")
                if number % world_size == rank:
                    block = np.frombuffer(data, np.uint8).reshape(length, *shape)
                    indices = list(range(first, first + length))
                    yield ImageBatch(indices, list(block), [f"{index:06d}" for index in indices])

    def _stream(self):
        try:
            return _Member(zipfile.ZipFile(self.path))
        except (OSError, zipfile.BadZipFile, KeyError) as error:
            raise DataError(f"{self.path} is no .npz with arr_0 ({error}).") from error


class _Member:
    """The stream of ``arr_0``, closed with its archive."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive, self._file = archive, archive.open("arr_0.npy")

    def __enter__(self):
        return self._file

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._archive.close()


def _read_header(stream, path: Path) -> tuple[int, ...]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(stream)
    if dtype != np.uint8 or len(shape) != 4 or is_fortran:
        raise DataError(f"{path}: arr_0 is {dtype} {shape}; expected uint8 (N, H, W, C).")
    return shape


class ShardImages:
    """Webdataset shards ``*.tar`` of a folder."""

    def __init__(self, folder: Path, shards: list[Path]) -> None:
        self.name, self._shards = str(folder), shards
        self._count = sum(1 for _ in self._members(read=False))

    def __len__(self) -> int:
        return self._count

    def batches(self, size: int, rank: int = 0, world_size: int = 1) -> Batches:
        block: list[tuple[str, NDArray]] = []
        for index, (file, pixels) in enumerate(self._members(lambda index: index // size % world_size == rank)):
            if pixels is not None:
                block.append((file, pixels))
            if block and ((index + 1) % size == 0 or index + 1 == self._count):
                indices = list(range(index + 1 - len(block), index + 1))
                yield ImageBatch(indices, [image for _, image in block], [name for name, _ in block])
                block = []

    def _members(
        self, wanted: Callable[[int], bool] = lambda index: True, *, read: bool = True
    ) -> Iterator[tuple[str, NDArray | None]]:
        index = 0
        for shard in self._shards:
            try:
                with tarfile.open(shard) as archive:
                    for member in archive:
                        if Path(member.name).suffix.lower() not in SUFFIXES:
                            continue
                        is_read = read and wanted(index)
                        yield member.name, _decode(archive, member, shard) if is_read else None
                        index += 1
            except (tarfile.TarError, EOFError, OSError) as error:
                raise DataError(f"{shard} is a damaged tar file ({error}); make or copy it again.") from error


def _decode(archive: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(archive.extractfile(member).read())) as image:
            pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{shard}: {member.name} is no image that can be read ({error}).") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


class NamedDataset:
    """A data set of ``mup_dit.datasets`` as images."""

    def __init__(self, name: str, split: str, size: int) -> None:
        self.name = f"{name} ({split})"
        self._dataset = build_dataset(name, split, size=size)

    def __len__(self) -> int:
        return len(self._dataset)

    def batches(self, size: int, rank: int = 0, world_size: int = 1) -> Batches:
        for first in range(rank * size, len(self), world_size * size):
            rows = np.arange(first, min(first + size, len(self)))
            images = to_uint8(self._dataset.fetch(rows)["image"], "nearest").numpy()
            yield ImageBatch(rows.tolist(), list(images), [str(row) for row in rows])


def open_images(
    where: str, *, option: str = "samples", split: str = "validation", size: int | None = None, on_error: str = "stop"
) -> ImageSet:
    """The images at a place.

    Args:
        where: ``.npz`` file, folder of images or of ``mup_dit.sample``, or the name of a data set (``digits``,
            ``imagefolder:DIR``, ...).
        option: what messages call the place.
        split, size: of a data set; no size means 256, of digits 8.
        on_error: ``stop`` or ``skip``, see ``FolderImages``.

    Raises: DataError if there is nothing.
    """
    require_choice("on_error", on_error, ON_ERROR)
    path = Path(where).expanduser()
    if not path.exists() and where.partition(":")[0] in KINDS:
        return NamedDataset(where, split, size or (DIGIT_SIDE if where == "digits" else DEFAULT_SIDE))
    if path.suffix == ".npz" and path.is_file():
        return NpzImages(path)
    if not path.is_dir():
        raise DataError(f"{option}={where} does not exist; give an .npz file, a folder of images or a data set's name.")
    if (path / "samples.npz").is_file():
        return NpzImages(path / "samples.npz")
    if shards := sorted(path.glob("*.tar")):
        return ShardImages(path, shards)
    files = manifest_files(path) or sorted(
        file.relative_to(path).as_posix()
        for file in path.rglob("*")
        if file.suffix.lower() in SUFFIXES and file.name != "grid.png" and not file.name.startswith(".")
    )
    if not files:
        raise DataError(f"{option}={where} holds no images ({', '.join(SUFFIXES)}), no samples.npz and no shards.")
    return FolderImages(where, path, files, on_error)


def read_manifest(folder: Path) -> list[dict]:
    """What ``mup_dit.sample`` says of each image; empty without a manifest.

    Raises: DataError for a manifest that is none.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}).") from error


def manifest_files(folder: Path) -> list[str]:
    """Names of the images that the manifest lists."""
    return [str(record["file"]) for record in read_manifest(folder) if "file" in record]
