"""Pickled files read by an allow-list: tensors, numbers, text, plain containers and ``argparse.Namespace``.

Three formats hold released hypernetworks: torch's archive, torch's older single stream, and the pickles of ``joblib``,
which puts the bytes of a numpy array behind the object that describes it. A pickle is a program; here it can call only
the functions below, which build data and do nothing else, and set attributes of nothing but the objects they made.

Source: formats of ``torch.save`` and of ``joblib.dump``; the latter is neither imported nor called.
"""

import argparse
import bz2
import gzip
import io
import lzma
import math
import pickle
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from common.errors import CheckpointError

TORCH_STREAM = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")  # the number that torch's older files begin with
DTYPE = re.compile(r"[biufc]\d{1,2}")
MAX_PEEK = 16
LARGE_BYTES = 1 << 16


class ForbiddenGlobal(Exception):
    """A pickle names something outside the allow-list."""


def read_pickled(path: Path | str) -> Any:
    """Contents of a file written by ``torch.save``, ``joblib.dump`` or ``pickle.dump``, on the CPU.

    Tensors of torch's archive are mapped from the file, not read: copy what must outlive it.

    Raises: CheckpointError if the file is missing or damaged, or needs something else than data (it is named).
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(MAX_PEEK)
        if zipfile.is_zipfile(path) or head.startswith(TORCH_STREAM):
            return _read_torch(path, mmap=not head.startswith(TORCH_STREAM))
        with _decompressed(path, head) as file:
            return _AllowListUnpickler(file).load()
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint={path} does not exist; give a file or a folder with weights.") from None
    except ForbiddenGlobal as error:
        raise CheckpointError(
            f"{path} cannot be read without executing what it holds ({error}); only tensors, plain containers and "
            "argparse.Namespace are read. Save its state dict alone with the program that made it."
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes are other instructions, which can fail in any way
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path} is no readable checkpoint ({lines[0][:160]}); copy it again.") from None


# ---------------------------------------------------------------------------------------------------- torch's formats


def _read_torch(path: Path | io.BytesIO, *, mmap: bool = False) -> Any:
    """By torch's own allow-list reader, with the few classes of a trainer's checkpoint added."""
    try:
        with torch.serialization.safe_globals(_SAFE):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|Unsupported class|function|type) ([\w.]+\.[\w.]+)", str(error))
        if named:
            raise ForbiddenGlobal(named[1]) from None
        if "Weights only load failed" in str(error):
            detail = re.search(r"WeightsUnpickler error: (.+)", str(error))
            raise ForbiddenGlobal(detail[1].strip() if detail else "an unknown instruction") from None
        raise


# ---------------------------------------------------------------------------------------------------- joblib's format


def _decompressed(path: Path, head: bytes) -> BinaryIO:
    """The file, unpacked as its first bytes say.

    Raises: CheckpointError for a compression that needs a library that is not here.
    """
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(path, "rb")
    if head.startswith(b"BZ"):
        return bz2.open(path, "rb")
    if head.startswith((b"\xfd7zXZ", b"]\x00")):
        return lzma.open(path, "rb")
    if head[:1] == b"x" and head[1:2] in (b"\x01", b"\x5e", b"\x9c", b"\xda"):
        return _inflated(path)
    if head.startswith(b"\x04\x22\x4d\x18"):
        raise CheckpointError(f"{path} is packed by lz4, which is not read here; save it again without compression.")
    return open(path, "rb")


def _inflated(path: Path) -> io.BytesIO:
    """A zlib stream, which has no file class of its own, unpacked in memory."""
    unpacked, reader = io.BytesIO(), zlib.decompressobj()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            unpacked.write(reader.decompress(block))
    unpacked.write(reader.flush())
    if not reader.eof:
        raise EOFError("the compressed data end early")
    unpacked.seek(0)
    return unpacked


class _Dtype:
    """Stands for ``numpy.dtype`` of numbers; others (objects, records) are refused."""

    def __init__(self, name: str = "", align: bool = False, copy: bool = False) -> None:
        if not DTYPE.fullmatch(str(name)):
            raise ForbiddenGlobal(f"numpy.dtype({name!r})")
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise ForbiddenGlobal(f"numpy.dtype with the byte order {state[1]!r}")
        self.order = state[1]

    @property
    def numpy(self) -> np.dtype:
        return np.dtype(f"{self.order}{self.name}")


class _ArrayWrapper:
    """Stands for ``joblib.numpy_pickle.NumpyArrayWrapper``: describes an array whose bytes come next in the file."""

    def __setstate__(self, state: dict) -> None:
        self.state = state

    def read(self, file: BinaryIO) -> np.ndarray:
        """The array; afterwards the file stands behind it."""
        dtype, shape, order = self.state["dtype"], tuple(self.state["shape"]), self.state["order"]
        if not isinstance(dtype, _Dtype) or not all(type(size) is int and size >= 0 for size in shape):
            raise ForbiddenGlobal("an array of something else than numbers")
        if self.state.get("numpy_array_alignment_bytes") is not None:
            file.read(int.from_bytes(_exactly(file, 1), "little"))  # moves the data to an aligned position
        data = _exactly(file, math.prod(shape) * dtype.numpy.itemsize)
        array = np.frombuffer(bytearray(data), dtype=dtype.numpy)
        return array.reshape(shape[::-1]).T if order == "F" else array.reshape(shape)


class _Ndarray:
    """Stands for the class ``numpy.ndarray`` where joblib names the kind of array."""


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise EOFError("the file ends inside an array")
    return data


def _scalar(dtype: _Dtype, data: bytes) -> int | float | bool | complex:
    """A numpy number as Python's."""
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
        raise ForbiddenGlobal("a numpy scalar of something else than a number")
    return np.frombuffer(data, dtype=dtype.numpy, count=1)[0].item()


def _storage(data: bytes) -> torch.storage.TypedStorage:
    """A tensor's memory, which is a torch file inside the pickle."""
    if not isinstance(data, bytes):
        raise ForbiddenGlobal("torch.storage._load_from_bytes of something else than bytes")
    storage = _read_torch(io.BytesIO(data))
    if not isinstance(storage, torch.storage.TypedStorage):
        raise ForbiddenGlobal(f"a tensor's memory that is a {type(storage).__name__}")
    return storage


def _tensor(storage: torch.storage.TypedStorage, offset: int, size: tuple, stride: tuple, *_: object) -> Tensor:
    """A view of ``storage``; one that reaches beyond it is refused."""
    if not isinstance(storage, torch.storage.TypedStorage) or len(size) != len(stride):
        raise ForbiddenGlobal("a tensor without memory of its own")
    whole = (offset, *size, *stride)
    if not all(type(number) is int and number >= 0 for number in whole):
        raise ValueError("a tensor has a negative size")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    memory, base = storage._untyped_storage, torch.empty(0, dtype=storage.dtype)
    if math.prod(size) and (last + 1) * base.element_size() > memory.nbytes():
        raise ValueError("a tensor reaches beyond its memory")
    return base.set_(memory, offset, tuple(size), tuple(stride))


def _latin1(text: str, encoding: str) -> bytes:
    """How protocols before the third write bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ForbiddenGlobal(f"_codecs.encode(..., {encoding!r})")
    return text.encode("latin1")


def _parameter(data: Tensor, *_: object) -> Tensor:
    return data


ALLOWED: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _latin1,
    ("argparse", "Namespace"): argparse.Namespace,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("joblib.numpy_pickle", "NumpyArrayWrapper"): _ArrayWrapper,
    ("numpy", "ndarray"): _Ndarray,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
}
"""All that a pickle may name, and what it gets for it."""
_SAFE = [
    argparse.Namespace,
    (_Dtype, "numpy.dtype"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
]
_HOLDS_STATE = (OrderedDict, argparse.Namespace, _ArrayWrapper, _Dtype)


class _Memo(dict):
    """What a pickle may refer to again, without the bytes of tensors: they would double the memory of a large file."""

    def __setitem__(self, key: int, value: Any) -> None:
        inner = value[0] if type(value) is tuple and len(value) == 1 else value
        is_large = type(inner) is bytes and len(inner) > LARGE_BYTES
        super().__setitem__(key, None if is_large else value)


class _AllowListUnpickler(pickle._Unpickler):
    """Python's own reader, because the one in C cannot be told that an array's bytes follow an object."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.file, self.memo = file, _Memo()

    def find_class(self, module: str, name: str) -> Callable:
        if (module, name) not in ALLOWED:
            raise ForbiddenGlobal(f"{module}.{name}")
        return ALLOWED[module, name]

    def get_extension(self, code: int) -> None:
        raise ForbiddenGlobal(f"registered extension {code}")

    def load_build(self) -> None:
        """Sets an object's attributes: those of the allowed classes only, never of a function or a class."""
        state, target = self.stack[-1], self.stack[-2]
        if type(target) not in _HOLDS_STATE:
            raise ForbiddenGlobal(f"attributes of {getattr(target, '__name__', type(target).__name__)}")
        if isinstance(target, _ArrayWrapper | _Dtype):
            target.__setstate__(state)
        elif isinstance(state, dict):
            # an OrderedDict's `_metadata` belongs to state dicts of modules
            target.__dict__.update({str(key): value for key, value in state.items()})
        else:
            raise ForbiddenGlobal(f"a state of {type(target).__name__} that is no dictionary")
        self.stack.pop()
        if isinstance(target, _ArrayWrapper):
            self.stack[-1] = target.read(self.file)

    dispatch[pickle.BUILD[0]] = load_build
