"""The reference's ``structure.cache``: a pickle with the statistics of a checkpoint folder, read without running code.

It holds ``structure``, per key ``(shape, mean, std)``, ``(shape, scale, mean, std)`` for running variances or
``(shape, value, None)`` for constants, and ``checkpoint_list``, the paths of the files that it was made from. Only the
few functions that tensors and shapes need are let in; anything else in the file is refused.
"""

import collections
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from common.errors import CheckpointError, DataError
from rpg.structure import Structure, TensorEntry


def _load_storage(data: bytes) -> object:
    """What ``torch.storage._load_from_bytes`` returns, but read with ``weights_only``."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


ALLOWED: Mapping[tuple[str, str], Callable] = {
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): _load_storage,
    ("collections", "OrderedDict"): collections.OrderedDict,
}


class _TensorUnpickler(pickle.Unpickler):
    """Knows the four globals above and no others; persistent ids are refused by the base class."""

    def find_class(self, module: str, name: str) -> Callable:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return ALLOWED[module, name]


@dataclass(frozen=True)
class StructureCache:
    """The converted structure, and the names of the files that it was made from."""

    structure: Structure
    checkpoint_names: tuple[str, ...]


def read_structure_cache(path: str | Path) -> StructureCache:
    """A ``structure.cache`` of the reference as our structure.

    The cache does not say dtypes: varying tensors are taken as float32, in which the reference returns them.

    Raises: CheckpointError if the file asks for anything but tensors and shapes, or is no such cache.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            loaded = _TensorUnpickler(stream).load()
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: {error}, which a cache of shapes and statistics has no need of. Do not load it."
        ) from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}); it is no structure.cache."
        ) from None
    if not isinstance(loaded, Mapping) or not isinstance(loaded.get("structure"), Mapping):
        raise CheckpointError(f"{path} holds no entry 'structure'; it is no structure.cache of the reference.")
    try:
        entries = tuple(_entry(str(name), facts) for name, facts in loaded["structure"].items())
    except (TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} is no structure.cache of the reference: {error}.") from None
    if not entries:
        raise DataError(f"{path} lists no tensor.")
    files = tuple(str(name).replace("\\", "/").rsplit("/", 1)[-1] for name in loaded.get("checkpoint_list") or ())
    return StructureCache(Structure(entries, "layer", len(files)), files)


def _entry(name: str, facts: Sequence[object]) -> TensorEntry:
    shape = tuple(int(size) for size in facts[0])
    if facts[-1] is None:
        value = facts[1]
        if not isinstance(value, Tensor):
            raise ValueError(f"the constant {name!r} is of type {type(value).__name__}")
        return TensorEntry(name, shape, value.dtype, "constant", value=value.detach().clone().reshape(shape))
    numbers = [float(value) for value in facts[1:]]
    if len(numbers) not in (2, 3):
        raise ValueError(f"{name!r} has {len(numbers)} statistics instead of 2 or 3")
    *scale, mean, std = numbers
    # the reference's deviation of a tensor whose values are all equal is 0; a one-element deviation would be NaN
    return TensorEntry(
        name, shape, torch.float32, mean=mean, std=std if std == std else 0.0, scale=scale[0] if scale else None
    )
