"""Cached features on disk: latents' mean and standard deviation, captions, labels; written once, mapped to read.

A folder holds ``recipe.json`` (what the features are of, with a digest of everything they depend on),
``shards/*.safetensors`` and, once every shard is there, ``features.json``. A shard appears whole or not at all, so a
killed extraction goes on with the shards that are missing. Tensors of a shard with R rows:

=========================  =========================================================================================
``row`` (R,)               row of the data set
``mean``, ``std``          (R, C, S, S) of the posterior, unscaled; ``mean_flipped``, ``std_flipped``: mirrored images
``label`` (R,)             class
``tokens`` (sum, Y)        caption features of the tokens that count, one caption after the other
``first_token`` (R + 1,)   where each caption begins
``pooled`` (R, P)          pooled text
``img_hw`` (R, 2)          height and width of the original image; ``aspect_ratio`` (R, 1) of the stored one
=========================  =========================================================================================

Dimensions: R rows, C channels, S side, T tokens, Y their channels, P channels of pooled text.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from common.checkpoint import write_json
from common.errors import DataError

FORMAT = 1  # part of every key: raise it when equal inputs would give other features
RECIPE_FILE, MANIFEST_FILE, SHARDS = "recipe.json", "features.json", "shards"
DTYPES = {"F16": np.float16, "F32": np.float32, "I64": np.int64, "U8": np.uint8}
LONGEST_HEADER = 1 << 20
OPEN_SHARDS = 128  # each takes a file descriptor

Arrays = dict[str, NDArray]


def write_shard(path: Path, arrays: Mapping[str, NDArray], note: Mapping[str, Any]) -> None:
    """Writes one shard under a temporary name and renames it; ``note`` goes into the file's metadata.

    Raises: DataError if the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
        save_file(contiguous, temporary, metadata={"note": json.dumps(note)})
        temporary.chmod(0o644)  # the library keeps files to their owner; caches are shared
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} could not be written ({error}); free disk space and run the same command.") from None
    finally:
        temporary.unlink(missing_ok=True)


def map_shard(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Arrays of a shard as views of one memory map, and its note; no tensor is read.

    Raises: DataError for a file that is missing, cut off, or no shard.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length < LONGEST_HEADER:
                raise ValueError("no header")
            header = json.loads(stream.read(length))
        note = json.loads(header.pop("__metadata__")["note"])
        begin, size = 8 + length, path.stat().st_size
        if begin + max((entry["data_offsets"][1] for entry in header.values()), default=0) != size:
            raise ValueError("its size is not that of its header")
        data = np.memmap(path, np.uint8, mode="r", offset=begin, shape=(size - begin,)) if size > begin else b""
        arrays = {
            name: np.frombuffer(data, DTYPES[entry["dtype"]], *_extent(entry)).reshape(entry["shape"])
            for name, entry in header.items()
        }
    except FileNotFoundError:
        raise DataError(f"{path} is missing; run `python -m mup_dit.extract` with the same options again.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no complete shard of features ({error}); delete it and extract again.") from None
    return arrays, note


def _extent(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Number of entries, and the offset in bytes."""
    first, last = entry["data_offsets"]
    return (last - first) // np.dtype(DTYPES[entry["dtype"]]).itemsize, first


class Shards:
    """Maps of the shards used last."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder, self.files = folder, files
        self._open: OrderedDict[int, Arrays] = OrderedDict()

    def __getitem__(self, number: int) -> Arrays:
        if number not in self._open:
            self._open[number] = map_shard(self.folder / SHARDS / self.files[number])[0]
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        """A loader's worker opens its own maps."""
        return {**self.__dict__, "_open": OrderedDict()}


def read_json(path: Path) -> dict[str, Any]:
    """Raises: DataError if the file is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no readable JSON ({error}); extract the features again.") from None


def claim_folder(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Makes ``folder`` the place of the features that ``recipe`` describes, or checks that it is.

    Raises: DataError if it holds features of something else, naming what differs.
    """
    path = folder / RECIPE_FILE
    if path.is_file():
        found = read_json(path)
        if found.get("key") != recipe["key"]:
            changed = [name for name in recipe if name != "key" and found.get(name) != recipe[name]] or ["the images"]
            raise DataError(
                f"output={folder} holds features of something else ({', '.join(changed)} differ); choose another one."
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"output={folder} holds other files; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, recipe)
