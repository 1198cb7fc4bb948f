"""Pickles are read as data: nothing they hold is executed, whatever wrote them."""

import argparse
import collections
import contextlib
import os
import pickle
import tracemalloc
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import CheckpointError
from logah.unpickling import read_pickled

WRITERS = {
    "joblib": lambda content, path: joblib.dump(content, path),
    "archive": lambda content, path: torch.save(content, path),
    "stream": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
}


def content() -> dict:
    base = torch.arange(12.0)
    return {
        "matrix": base.view(3, 4),
        "transposed": base.view(3, 4).t(),
        "slice": base[2:9:3],
        "number": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "bf16": torch.ones(3, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "integers": torch.arange(3),
        "options": argparse.Namespace(lr=1e-3, sizes=(1, 2), name="x", nested={"a": [None, True]}),
        "ordered": collections.OrderedDict(a=1),
    }


def assert_equal_content(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("writer", WRITERS)
def test_tensors_options_and_containers_come_back(tmp_path: Path, writer: str):
    WRITERS[writer](content(), tmp_path / "file.pt")
    assert_equal_content(read_pickled(tmp_path / "file.pt"), content())


@pytest.mark.parametrize("compress", [0, 3, ("gzip", 3), ("bz2", 3), ("lzma", 3), ("xz", 3)])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_of_joblib_come_back(tmp_path: Path, compress, protocol: int):
    arrays = {
        "plain": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big_endian": np.arange(3, dtype=">f4"),
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 3)),
        "tensor": torch.arange(5.0),
        "after": "text",
    }
    joblib.dump(arrays, tmp_path / "file", compress=compress, protocol=protocol)
    found = read_pickled(tmp_path / "file")
    for name, value in arrays.items():
        assert np.array_equal(found[name], value), name
    assert found["plain"].flags.writeable


def test_numpy_numbers_become_pythons(tmp_path: Path):
    for writer in ("joblib", "archive"):
        WRITERS[writer]({"loss": np.float64(2.5), "step": np.int64(4)}, tmp_path / writer)
        assert read_pickled(tmp_path / writer) == {"loss": 2.5, "step": 4}


class CallsSystem:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_forbidden_global_is_named_and_never_called(tmp_path: Path, writer: str):
    marker = tmp_path / "called"
    WRITERS[writer]({"weight": torch.ones(2), "bad": CallsSystem(marker)}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"file\.pt cannot be read without executing .*system"):
        read_pickled(tmp_path / "file.pt")
    assert not marker.exists()


@pytest.mark.parametrize("writer", ["joblib", "stream"])
def test_a_forbidden_global_inside_a_tensors_memory_is_refused_too(tmp_path: Path, writer: str):
    marker = tmp_path / "called"
    inner = tmp_path / "inner"
    WRITERS[writer](CallsSystem(marker), inner)

    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (inner.read_bytes(),)

    joblib.dump({"weight": Storage()}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError):
        read_pickled(tmp_path / "file.pt")
    assert not marker.exists()


def test_arrays_of_objects_are_refused(tmp_path: Path):
    joblib.dump({"bad": np.array([{"a": 1}], dtype=object)}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="numpy.dtype"):
        read_pickled(tmp_path / "file.pt")


def test_a_pickle_cannot_change_the_functions_it_may_call(tmp_path: Path):
    # GLOBAL _rebuild_tensor_v2, then BUILD with (None, {"__defaults__": ...}) on the function itself
    program = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__)s\x86b."
    (tmp_path / "file.pt").write_bytes(program)
    with pytest.raises(CheckpointError, match="attributes of"):
        read_pickled(tmp_path / "file.pt")


def test_a_tensor_beyond_its_memory_is_refused(tmp_path: Path):
    class Beyond:
        def __reduce__(self):
            storage = torch.ones(4)._typed_storage()
            return torch._utils._rebuild_tensor_v2, (storage, 0, (100,), (1,), False, collections.OrderedDict())

    joblib.dump({"weight": Beyond()}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="beyond its memory"):
        read_pickled(tmp_path / "file.pt")


def test_large_tensors_are_not_held_twice(tmp_path: Path):
    joblib.dump({f"w{number}": torch.full((1 << 18,), float(number)) for number in range(8)}, tmp_path / "file.pt")
    tracemalloc.start()  # sees Python's bytes, not the tensors' memory
    try:
        found = read_pickled(tmp_path / "file.pt")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * (1 << 20)  # of 8 MiB in the file
    assert [float(found[f"w{number}"].mean()) for number in range(8)] == list(range(8))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="absent.pt does not exist"):
        read_pickled(tmp_path / "absent.pt")


@pytest.mark.parametrize("writer", WRITERS)
@settings(max_examples=40)
@given(data=st.data())
def test_a_damaged_file_is_an_error_of_the_user(tmp_path_factory, writer: str, data):
    path = tmp_path_factory.mktemp("damaged") / "file.pt"
    WRITERS[writer]({"a": torch.arange(6.0).view(2, 3), "n": argparse.Namespace(x=1), "t": "text"}, path)
    whole = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    with contextlib.suppress(CheckpointError):  # a flipped bit of a number goes unseen; anything else is a bug
        read_pickled(path)
