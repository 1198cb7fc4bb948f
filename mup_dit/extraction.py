"""Extraction of features: images through a VAE, captions through a text encoder, into shards that later runs read.

Shards are dealt out to processes in turn; what is in one does not depend on who makes it, nor on the batch.

Dimensions: B rows, C channels, H, W rows and columns of pixels, T tokens, Y their channels.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import provenance
from common.checkpoint import write_json
from common.data.fingerprint import text_fingerprint
from common.errors import ConfigError, DataError
from common.parallel import Parallel
from mup_dit.aspect_ratios import TABLES, nearest_bucket
from mup_dit.batches import ImageDataset, Rows, TextEncoder
from mup_dit.encoders import ImageEncoder, encoder_fingerprint
from mup_dit.features import FORMAT, MANIFEST_FILE, SHARDS, Arrays, claim_folder, map_shard, write_shard
from mup_dit.images import color_mode, fit_and_crop, to_array, to_tensor

Size = tuple[int, int]  # height and width in pixels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardPlan:
    """One shard: its file, and the rows of the data set that it holds."""

    file: str
    size: Size
    rows: Rows


@dataclass(frozen=True)
class Loaded:
    """Images of one batch; ``rows`` are those that could be read, ``skipped`` says of the others why."""

    rows: Rows
    image: Tensor  # (B, C, H, W) in [-1, 1]
    img_hw: Rows | None
    skipped: tuple[str, ...] = ()


class Extractor:
    """Features of one data set.

    Args:
        size: side of the images, or of the square of the same area with ``multi_scale``.
        vae, text: either may be None.
        shard_rows: rows per shard.
        batch_size: images encoded at once.
        flips: encode the mirrored images too.
        dtype: of what is stored, ``fp16`` or ``fp32``.
        on_error: ``stop`` at an image that cannot be read, or leave it out and list it in the manifest (``skip``).
        multi_scale: every image at the aspect ratio next to its own (sizes 256, 512, 1024); needs image files.

    Raises: ConfigError for options that do not fit the data.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        size: int,
        channels: int = 3,
        vae: ImageEncoder | None,
        text: TextEncoder | None = None,
        shard_rows: int = 4096,
        batch_size: int = 32,
        flips: bool = False,
        dtype: str = "fp16",
        on_error: str = "stop",
        multi_scale: bool = False,
        num_workers: int = 0,
    ) -> None:
        if vae is None and text is None:
            raise ConfigError("there is nothing to extract: give vae, text, or both.")
        if text is not None and dataset.captions(np.arange(1)) is None:
            raise ConfigError(f"text={getattr(text, 'name', 'small')}, but the data have no captions; set text=null.")
        if multi_scale and (size not in TABLES or not hasattr(dataset, "image")):
            raise ConfigError(f"multi_scale=true needs image files and a size of {', '.join(map(str, TABLES))}.")
        if vae is not None and size % vae.factor:
            raise ConfigError(f"size={size} is no multiple of {vae.factor}, the pixels per latent of vae={vae.name}.")
        self.dataset, self.size, self.channels, self.vae, self.text = dataset, size, channels, vae, text
        self.shard_rows, self.batch_size, self.flips, self.on_error = shard_rows, batch_size, flips, on_error
        self.multi_scale, self.num_workers = multi_scale, num_workers
        self.dtype_name, self.dtype = dtype, np.dtype({"fp16": np.float16, "fp32": np.float32}[dtype])

    def recipe(self) -> dict[str, Any]:
        """What the features are of; ``key`` is a digest of everything they depend on."""
        described = {
            "format": FORMAT,
            "images": len(self.dataset),
            "size": self.size,
            "multi_scale": self.multi_scale,
            "vae": None if self.vae is None else self.vae.name,
            "text": None if self.text is None else getattr(self.text, "name", "small"),
            "flips": self.flips,
            "dtype": self.dtype_name,
            "shard_rows": self.shard_rows,
        }
        contents = [encoder_fingerprint(self.vae), encoder_fingerprint(self.text), self.dataset.fingerprint()]
        return {"key": text_fingerprint(*described.items(), *contents), **described}

    # ---------------------------------------------------------------- plan

    def plan(self) -> list[ShardPlan]:
        """All shards, the same on every process.

        Raises: DataError naming an image whose size cannot be read, unless such images are skipped.
        """
        groups = self._groups() if self.multi_scale else {(self.size, self.size): np.arange(len(self.dataset))}
        shards = []
        for (height, width), rows in sorted(groups.items()):
            prefix = f"{height}x{width}-" if self.multi_scale else ""
            for number, first in enumerate(range(0, len(rows), self.shard_rows)):
                part = rows[first : first + self.shard_rows]
                shards.append(ShardPlan(f"{prefix}{number:06d}.safetensors", (height, width), part))
        return shards

    def _groups(self) -> dict[Size, Rows]:
        table, groups = TABLES[self.size], {}
        for row in range(len(self.dataset)):
            try:
                bucket = nearest_bucket(*self.dataset.image_size(row), table)
            except DataError:
                if self.on_error == "stop":
                    raise
                bucket = (self.size, self.size)  # where the error is met again, and listed
            groups.setdefault(bucket, []).append(row)
        return {bucket: np.array(rows) for bucket, rows in groups.items()}

    # ---------------------------------------------------------------- run

    def run(self, folder: Path, parallel: Parallel, *, limit: tuple[int, int | None] = (0, None)) -> dict[str, Any]:
        """Writes the shards that are not there yet, and the manifest once all are.

        Args:
            limit: first and last (exclusive) shard to make, to share the work between machines.

        Returns: ``made``, ``kept`` and ``missing`` shards, ``rows`` and ``skipped`` images.

        Raises: DataError if the folder holds features of something else, or an image cannot be read.
        """
        if parallel.is_main:
            claim_folder(folder, self.recipe())
        parallel.barrier()
        shards = self.plan()
        chosen = shards[limit[0] : limit[1]]
        mine = [shard for shard in chosen[parallel.rank :: parallel.world_size] if not self._is_there(folder, shard)]
        bar = tqdm(mine, unit="shard", disable=None if parallel.is_main else True, leave=False)
        for shard in bar:
            arrays, skipped = self.extract(shard)
            write_shard(folder / SHARDS / shard.file, arrays, {"skipped": list(skipped), "size": list(shard.size)})
        (made,) = parallel.sum([len(mine)])
        parallel.barrier()
        if not parallel.is_main:
            return {}
        return self._finish(folder, shards, int(made), len(chosen))

    def _is_there(self, folder: Path, shard: ShardPlan) -> bool:
        path = folder / SHARDS / shard.file
        if not path.exists():
            return False
        try:
            map_shard(path)
        except DataError as error:
            logger.warning("to be made again: %s", error)
            return False
        return True

    def _finish(self, folder: Path, shards: Sequence[ShardPlan], made: int, chosen: int) -> dict[str, Any]:
        missing = [shard.file for shard in shards if not self._is_there(folder, shard)]
        entries, skipped = [], []
        for shard in shards if not missing else []:
            arrays, note = map_shard(folder / SHARDS / shard.file)
            skipped += note["skipped"]
            entries.append({"file": shard.file, "rows": len(arrays["row"]), "size": list(shard.size)})
        summary = {"made": made, "kept": chosen - made, "missing": len(missing), "skipped": len(skipped)}
        summary["rows"] = sum(entry["rows"] for entry in entries)
        if not missing:
            small = self.text.to_dict() if hasattr(self.text, "to_dict") else None
            manifest = {
                "recipe": self.recipe(),
                "latent_scale": None if self.vae is None else self.vae.scale,
                "caption_length": None if self.text is None else self.text.length,
                "text": small or getattr(self.text, "name", None),
                "classes": self.dataset.classes,
                "skipped": skipped,
                "shards": entries,
                **provenance.collect(),
            }
            write_json(folder / MANIFEST_FILE, manifest)
        return summary

    def extract(self, shard: ShardPlan) -> tuple[Arrays, tuple[str, ...]]:
        """All arrays of a shard, and what was skipped."""
        parts: dict[str, list[np.ndarray]] = {}
        skipped: list[str] = []
        rows = shard.rows
        batches = [rows[first : first + self.batch_size] for first in range(0, len(rows), self.batch_size)]
        for arrays, left_out in self.encoded(batches, shard.size):
            skipped += left_out
            counts = {"first_token": np.diff(arrays["first_token"])} if "first_token" in arrays else {}
            for name, value in {**arrays, **counts}.items():
                parts.setdefault(name, []).append(value)
        arrays = {name: np.concatenate(values) for name, values in parts.items()} or {"row": np.zeros(0, np.int64)}
        if "first_token" in arrays:
            arrays["first_token"] = np.concatenate([[0], np.cumsum(arrays["first_token"])])
        return arrays, tuple(skipped)

    def encoded(self, batches: Sequence[Rows], size: Size | None = None) -> Iterator[tuple[Arrays, tuple[str, ...]]]:
        """Arrays of each batch (as those of a shard), and what was skipped; batches without any image are left out."""
        size = size or (self.size, self.size)
        image = self._scaled_image if self.multi_scale else None
        read = _Reader(self.dataset, size, self.on_error, self.vae is not None, self.channels, image)
        skipped: tuple[str, ...] = ()
        for loaded in DataLoader(
            _Reads(batches, read), batch_size=None, num_workers=self.num_workers, collate_fn=_as_is
        ):
            skipped += loaded.skipped
            if len(loaded.rows):
                yield self._encode(loaded, size), skipped
                skipped = ()
        if skipped:  # of a last batch without any image
            yield {"row": np.zeros(0, np.int64)}, skipped

    def _encode(self, loaded: Loaded, size: Size) -> Arrays:
        rows = loaded.rows
        found: Arrays = {"row": rows.astype(np.int64)}
        if self.vae is not None:
            for ending, image in (("", loaded.image), ("_flipped", loaded.image.flip(-1))):
                if not ending or self.flips:
                    mean, std = self.vae.encode(image)
                    found[f"mean{ending}"], found[f"std{ending}"] = self._stored(mean), self._stored(std)
        label = self.dataset.labels(rows)
        if label is not None:
            found["label"] = label.astype(np.int64)
        if loaded.img_hw is not None:
            found["img_hw"] = loaded.img_hw.astype(np.float32)
            found["aspect_ratio"] = np.full((len(rows), 1), size[0] / size[1], np.float32)
        if self.text is not None:
            encoded = self.text(self.dataset.captions(rows))
            counted_BT = encoded["mask"].bool()
            found["tokens"] = self._stored(encoded["caption"][:, 0][counted_BT])
            found["first_token"] = np.concatenate([[0], np.cumsum(counted_BT.sum(dim=1).cpu().numpy())])
            if "pooled" in encoded:
                found["pooled"] = self._stored(encoded["pooled"])
        return found

    def _stored(self, value: Tensor) -> np.ndarray:
        return value.float().cpu().numpy().astype(self.dtype)

    # ---------------------------------------------------------------- images

    def _scaled_image(self, row: int, size: Size) -> Tensor:
        image = self.dataset.image(row).convert(color_mode(self.channels))
        return to_tensor(to_array(fit_and_crop(image, *size))[None])[0]


class _Reader:
    """Reads a batch; picklable for the loader's workers."""

    def __init__(
        self,
        dataset: ImageDataset,
        size: Size,
        on_error: str,
        wants_images: bool,
        channels: int,
        scaled: Callable[[int, Size], Tensor] | None,
    ) -> None:
        self.dataset, self.size, self.on_error, self.wants_images = dataset, size, on_error, wants_images
        self.channels, self.scaled = channels, scaled

    def __call__(self, rows: Rows) -> Loaded:
        try:
            return self._read(rows, ())
        except DataError:
            if self.on_error == "stop":
                raise
        good, skipped = [], []
        for row in rows:  # again one by one, to find which
            try:
                self._read(np.array([row]), ())
                good.append(row)
            except DataError as error:
                logger.warning("left out: %s", error)
                skipped.append(str(error))
        return self._read(np.array(good, np.int64), tuple(skipped))

    def _read(self, rows: Rows, skipped: tuple[str, ...]) -> Loaded:
        img_hw = None
        if hasattr(self.dataset, "image_size") and self.wants_images:
            img_hw = np.array([self.dataset.image_size(int(row)) for row in rows]).reshape(len(rows), 2)
        if not self.wants_images or not len(rows):
            return Loaded(rows, torch.zeros(len(rows), self.channels, *self.size), img_hw, skipped)
        if self.scaled is not None:
            image = torch.stack([self.scaled(int(row), self.size) for row in rows])
        else:
            # not `fetch`, which would read conditions that may be what is to be made
            pixels = getattr(self.dataset, "pixels", None)
            image = pixels(rows) if pixels is not None else self.dataset.fetch(rows)["image"]
        return Loaded(rows, image, img_hw, skipped)


class _Reads(Dataset):
    def __init__(self, batches: Sequence[Rows], read: Callable[[Rows], Loaded]) -> None:
        self.batches, self.read = batches, read

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Loaded:
        return self.read(self.batches[number])


def _as_is(loaded: Loaded) -> Loaded:
    return loaded
