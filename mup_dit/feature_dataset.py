"""Cached features as a data set: latents and conditions by row number, straight from memory maps.

Dimensions: B rows, C channels, S side, T tokens, Y their channels.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import ConfigError, DataError
from mup_dit.batches import Batch, Rows
from mup_dit.features import MANIFEST_FILE, RECIPE_FILE, Arrays, Shards, read_json

PLAIN = ("label", "pooled", "img_hw", "aspect_ratio")


class FeatureDataset:
    """Rows of a folder that ``python -m mup_dit.extract`` wrote.

    A batch holds ``mean`` and ``std`` as stored (float16 by default, unscaled): the posterior is sampled by the caller,
    ``(mean + std * noise) * scale``, anew in every epoch.

    Args:
        flips: the second half of the rows are the mirrored images, where they were extracted.

    Attributes:
        scale: the VAE's, on latents.
        vae: its name.
        text: name of the text encoder, or the description of a small one.
        buckets: (height, width) in pixels -> numbers of the rows, where images have several sizes.

    Raises: DataError if the folder is incomplete or damaged, ConfigError for flips that were not extracted.
    """

    rows_per_read = 256  # a worker's message is worth so many rows

    def __init__(self, folder: str | Path, split: str = "train", *, flips: bool = False) -> None:
        folder = Path(folder)
        if not (folder / MANIFEST_FILE).is_file() and (folder / split).is_dir():
            folder = folder / split
        if not (folder / MANIFEST_FILE).is_file():
            state = "not complete; run the same extraction again" if (folder / RECIPE_FILE).is_file() else "no features"
            raise DataError(
                f"{folder} holds {state} ({MANIFEST_FILE} is missing). `python -m mup_dit.extract` writes it."
            )
        self.folder, self.manifest = folder, read_json(folder / MANIFEST_FILE)
        try:
            recipe: dict[str, Any] = self.manifest["recipe"]
            shards = self.manifest["shards"]
            self.shards = Shards(folder, [shard["file"] for shard in shards])
            counts = np.array([shard["rows"] for shard in shards], np.int64)
            sizes = [tuple(shard["size"]) for shard in shards]
            self.classes = None if self.manifest["classes"] is None else tuple(self.manifest["classes"])
            self.vae, self.text = recipe["vae"], self.manifest["text"]
            self.scale, self._length = self.manifest["latent_scale"], self.manifest["caption_length"]
        except (KeyError, TypeError) as error:
            raise DataError(f"{folder / MANIFEST_FILE} lacks {error}; extract the features again.") from None
        if flips and not recipe["flips"]:
            raise ConfigError(
                f"data.flips=true, but {folder} was extracted without mirrored images, which cannot be made from "
                "latents; extract with flips=true."
            )
        self.flips = flips
        self._first = np.concatenate([[0], np.cumsum(counts)])
        if not self._first[-1]:
            raise DataError(f"{folder} holds no rows: every image was skipped.")
        self.buckets: dict[tuple[int, int], Rows] = {}
        for number, size in enumerate(sizes):
            rows = np.arange(self._first[number], self._first[number + 1])
            self.buckets[size] = np.concatenate([self.buckets.get(size, rows[:0]), rows])

    @property
    def num_images(self) -> int:
        return int(self._first[-1])

    def __len__(self) -> int:
        return self.num_images * (2 if self.flips else 1)

    def fetch(self, rows: Rows) -> Batch:
        """Raises: DataError if the rows' latents have several sizes (``mup_dit.buckets`` makes batches of one)."""
        rows = np.asarray(rows)
        number, local = self._place(rows)
        mirrored = rows >= self.num_images
        batch: dict[str, np.ndarray] = {}
        # one visit per shard and kind, whatever the order of the rows
        group = number * 2 + mirrored
        for value in np.unique(group):
            where = np.flatnonzero(group == value)
            arrays = self.shards[int(value) // 2]
            for name, part in self._read(arrays, local[where], bool(value % 2)).items():
                if name not in batch:
                    batch[name] = np.empty((len(rows), *part.shape[1:]), part.dtype)
                if batch[name].shape[1:] != part.shape[1:]:
                    raise DataError(
                        f"{self.folder}: rows of one batch have latents of {batch[name].shape[1:]} and "
                        f"{part.shape[1:]}; train in buckets, or extract without multi_scale."
                    )
                batch[name][where] = part
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def _read(self, arrays: Arrays, local: Rows, mirrored: bool) -> dict[str, np.ndarray]:
        ending = "_flipped" if mirrored else ""
        found = {name: arrays[f"{name}{ending}"][local] for name in ("mean", "std") if name in arrays}
        found |= {name: arrays[name][local] for name in PLAIN if name in arrays}
        if "tokens" in arrays:
            first, tokens = arrays["first_token"], arrays["tokens"]
            caption = np.zeros((len(local), 1, self._length, tokens.shape[1]), tokens.dtype)
            mask = np.zeros((len(local), self._length), np.int64)
            for place, row in enumerate(local):
                count = int(first[row + 1] - first[row])
                caption[place, 0, :count] = tokens[first[row] : first[row + 1]]
                mask[place, :count] = 1
            found |= {"caption": caption, "mask": mask}
        return found

    def _place(self, rows: Rows) -> tuple[Rows, Rows]:
        """Shard of every row, and its number there."""
        images = np.asarray(rows) % self.num_images
        number = np.searchsorted(self._first, images, side="right") - 1
        return number, images - self._first[number]

    def source_rows(self, rows: Rows) -> Rows:
        """Rows of the data set that the features were extracted from."""
        number, local = self._place(rows)
        return np.array([self.shards[int(n)]["row"][i] for n, i in zip(number, local, strict=True)], np.int64)

    def labels(self, rows: Rows) -> Rows | None:
        number, local = self._place(rows)
        if "label" not in self.shards[int(np.argmax(np.diff(self._first)))]:  # of a shard that has rows
            return None
        return np.array([self.shards[int(n)]["label"][i] for n, i in zip(number, local, strict=True)], np.int64)

    def captions(self, rows: Rows) -> list[str] | None:
        return None

    def fingerprint(self) -> str:
        return self.manifest["recipe"]["key"]
