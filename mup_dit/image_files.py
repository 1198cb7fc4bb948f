"""Images on disk: pixels, ``.npz`` batches, webdataset shards, folders of PNG or JPEG files.

A writer takes blocks of consecutive images. Which process writes a block does not matter; a file appears whole or not
at all, and blocks that are there need not be made again.

Dimensions: B images, C channels, S side; H, W rows and columns of pixels.
"""

import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from common.config import require_choice
from common.errors import DataError

ROUNDING = ("truncate", "nearest")
FORMATS = ("npz", "webdataset", "png", "jpg")
PARTS = ".parts"
JPEG_QUALITY = 95

Records = Sequence[Mapping[str, object]]
"""What the manifest says of each image; ``index`` and ``file`` always."""


def to_uint8(x_BCSS: Tensor, rounding: str = "truncate") -> Tensor:
    """Images in [-1, 1] -> uint8 ``(B, H, W, C)``; values outside are clipped.

    Args:
        rounding: ``truncate``: 127.5 x + 128 cut off, the rule of the reference's DiT sampler; ``nearest``: 127.5
            (x + 1) + 0.5 cut off, that of its PixArt-alpha sampler.
    """
    require_choice("rounding", rounding, ROUNDING)
    if rounding == "truncate":
        values = (127.5 * x_BCSS + 128.0).clamp(0, 255)
    else:
        values = (x_BCSS.clamp(-1, 1) + 1) / 2 * 255 + 0.5
    return values.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_image(pixels_HWC: np.ndarray) -> Image.Image:
    """A PIL image; one channel becomes grey."""
    return Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[-1] == 1 else pixels_HWC)


def read_image(path: Path) -> np.ndarray:
    """uint8 ``(H, W, 3)``, or ``(H, W, 1)`` for grey files.

    Raises: DataError naming a file that is missing or broken.
    """
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path} is no image that can be read ({error}); make it again.") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def image_grid(images_BHWC: np.ndarray, columns: int | None = None) -> np.ndarray:
    """One image of all, row by row, two black pixels apart."""
    count, height, width, channels = images_BHWC.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    grid = np.zeros((rows * (height + 2) - 2, columns * (width + 2) - 2, channels), np.uint8)
    for index, image in enumerate(images_BHWC):
        top, left = index // columns * (height + 2), index % columns * (width + 2)
        grid[top : top + height, left : left + width] = image
    return grid


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a temporary file beside ``path`` and renames it: readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_npz(path: Path, blocks: Iterable[np.ndarray], shape: tuple[int, ...]) -> None:
    """``arr_0`` of an uncompressed ``.npz`` from blocks of uint8 images, one block in memory at a time.

    Raises: DataError if the blocks are not ``shape`` together.
    """

    def write(temporary: Path) -> None:
        count = 0
        with (
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
            archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as stream,
        ):
            header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(stream, header)
            for block in blocks:
                if block.shape[1:] != tuple(shape[1:]) or block.dtype != np.uint8:
                    raise DataError(
                        f"images {count} to {count + len(block) - 1} have shape {block.shape[1:]} ({block.dtype}), the "
                        f"first ones {tuple(shape[1:])} (uint8); an .npz holds images of one size."
                    )
                stream.write(np.ascontiguousarray(block).data)
                count += len(block)
        if count != shape[0]:
            raise DataError(f"{path}: {count} images, expected {shape[0]}.")

    replace_whole(path, write)


class NpzWriter:
    """``samples.npz`` with ``arr_0`` (N, H, W, C) by index; blocks wait in a folder until all are there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _part(self, first: int) -> Path:
        return self.folder / PARTS / f"{first:08d}.npy"

    def has(self, records: Records) -> bool:
        return (self.folder / "samples.npz").exists() or self._part(records[0]["index"]).exists()

    def write(self, images: Sequence[np.ndarray], records: Records) -> None:
        def write(temporary: Path) -> None:
            with temporary.open("wb") as stream:
                np.save(stream, np.stack(images))

        replace_whole(self._part(records[0]["index"]), write)

    def finish(self, total: int) -> None:
        """Joins the blocks. Raises: DataError if images are missing."""
        parts = sorted((self.folder / PARTS).glob("*.npy"))
        if not parts and (self.folder / "samples.npz").exists():
            return
        first = np.load(parts[0], mmap_mode="r")
        write_npz(self.folder / "samples.npz", map(np.load, parts), (total, *first.shape[1:]))
        for part in parts:
            part.unlink()


class FolderWriter:
    """One file per image, named by the manifest; sub-folders are made as the names ask for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, records: Records) -> bool:
        return all((self.folder / str(record["file"])).exists() for record in records)

    def write(self, images: Sequence[np.ndarray], records: Records) -> None:
        for pixels, record in zip(images, records, strict=True):
            path = self.folder / str(record["file"])
            replace_whole(path, lambda temporary, pixels=pixels, path=path: _save(temporary, pixels, path.suffix))

    def finish(self, total: int) -> None:
        """There is nothing to join."""


class WebdatasetWriter:
    """``shard-000000.tar`` with ``000000.png`` and ``000000.json`` of each image; a block is a shard."""

    def __init__(self, folder: Path, shard_size: int) -> None:
        self.folder, self.shard_size = folder, shard_size

    def _shard(self, first: int) -> Path:
        return self.folder / f"shard-{first // self.shard_size:06d}.tar"

    def has(self, records: Records) -> bool:
        return self._shard(records[0]["index"]).exists()

    def write(self, images: Sequence[np.ndarray], records: Records) -> None:
        def write(temporary: Path) -> None:
            with tarfile.open(temporary, "w") as archive:
                for pixels, record in zip(images, records, strict=True):
                    stem = f"{record['index']:06d}"
                    _add(archive, f"{stem}.png", _encode(pixels, ".png"))
                    _add(archive, f"{stem}.json", json.dumps(record, ensure_ascii=False).encode())

        replace_whole(self._shard(records[0]["index"]), write)

    def finish(self, total: int) -> None:
        """There is nothing to join."""


Writer = NpzWriter | FolderWriter | WebdatasetWriter


def build_writer(kind: str, folder: Path, shard_size: int) -> Writer:
    """Raises: ConfigError for an unknown format."""
    require_choice("format", kind, FORMATS)
    if kind == "npz":
        return NpzWriter(folder)
    return WebdatasetWriter(folder, shard_size) if kind == "webdataset" else FolderWriter(folder)


def pack_folder(folder: Path, output: Path, count: int) -> int:
    """Images ``000000.png`` to ``count - 1`` of a folder -> ``arr_0`` of an ``.npz``, streamed.

    Returns: files beyond the count, which are left out (samplers round the number up to whole batches).

    Raises: DataError naming the first index that is missing or broken.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give the one that holds 000000.png.")
    paths = [folder / f"{index:06d}.png" for index in range(count)]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    if missing:
        raise DataError(
            f"{folder}: image {missing[0]:06d}.png is missing ({len(missing)} of {count} are); sample again with "
            "resume=true, or pack fewer with count=."
        )
    first = read_image(paths[0])
    write_npz(output, (read_image(path)[None] for path in paths), (count, *first.shape))
    return sum(path.stem.isdigit() for path in folder.glob("*.png")) - count


def remove_parts(folder: Path) -> None:
    """Removes what only an unfinished run needs."""
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def _save(path: Path, pixels_HWC: np.ndarray, suffix: str) -> None:
    path.write_bytes(_encode(pixels_HWC, suffix))


def _encode(pixels_HWC: np.ndarray, suffix: str) -> bytes:
    buffer = io.BytesIO()
    if suffix == ".png":
        to_image(pixels_HWC).save(buffer, format="PNG")
    else:
        to_image(pixels_HWC).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # time stamp 0: equal images make equal shards
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
