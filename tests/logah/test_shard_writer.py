"""Safetensors files filled row by row: any reader takes them, and a full disk leaves nothing behind."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from common.checkpoint import read_weights
from common.errors import CheckpointError, ConfigError
from common.folders import write_folder
from logah import shard_writer
from logah.shard_writer import INDEX_FILE, NullSink, PlannedTensor, ShardWriter, plan_shards


def planned(tensors: dict[str, torch.Tensor]) -> list[PlannedTensor]:
    return [PlannedTensor(name, tuple(value.shape), value.dtype) for name, value in tensors.items()]


def write(folder: Path, tensors: dict[str, torch.Tensor], max_bytes: int, *, rows: int = 0, tied=None) -> ShardWriter:
    """Writes ``tensors`` into ``folder``, ``rows`` at a time where there are any."""
    with ShardWriter(folder, plan_shards(planned(tensors), max_bytes), tied) as writer:
        for name, value in tensors.items():
            step = rows if rows and value.ndim else 0
            for start in range(0, len(value), step) if step else [0]:
                writer.write(name, value[start : start + step] if step else value, start)
        writer.finish()
    return writer


TENSORS = {
    "a": torch.arange(12.0).reshape(4, 3),
    "odd": torch.randn(3, 5).bfloat16(),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 4),
    "mask": torch.tensor([True, False, True]),
    "b": torch.randn(2, 3, 2, 2),
}


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_one_file_holds_every_tensor_bit_for_bit(tmp_path, rows):
    write(tmp_path, TENSORS, 10**6, rows=rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_wider_types_come_first_so_that_every_tensor_is_aligned(tmp_path):
    (shard,) = plan_shards(planned(TENSORS), 10**6)
    header = json.loads(shard.header({})[8:])
    start = len(shard.header({}))
    assert start % 8 == 0
    for tensor in shard.tensors:
        assert (start + header[tensor.name]["data_offsets"][0]) % tensor.dtype.itemsize == 0


@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=9),
    max_bytes=st.integers(1, 400),
)
def test_shards_hold_each_tensor_once_in_order_and_within_the_limit(sizes, max_bytes):
    tensors = [PlannedTensor(f"t{i}", size, torch.float32) for i, size in enumerate(sizes)]
    shards = plan_shards(tensors, max_bytes)
    assert [tensor for shard in shards for tensor in shard.tensors] == tensors
    assert all(shard.num_bytes <= max_bytes or len(shard.tensors) == 1 for shard in shards)
    assert len({shard.file_name for shard in shards}) == len(shards)


def test_several_files_have_an_index_with_every_tensor(tmp_path):
    writer = write(tmp_path, TENSORS, 60, rows=2)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == writer.num_bytes == sum(v.nbytes for v in TENSORS.values())
    assert index["weight_map"].keys() == TENSORS.keys()
    for name, file_name in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file_name)[name], TENSORS[name])


def test_tied_names_are_noted_in_the_file_of_their_tensor(tmp_path):
    write(tmp_path, {"a": TENSORS["a"]}, 10**6, tied={"head": "a"})
    found = read_weights(tmp_path / "model.safetensors")
    assert torch.equal(found["head"], TENSORS["a"])


def test_too_little_space_is_refused_before_any_file_is_made(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shard_writer.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(CheckpointError, match=r"the weights need .* GB; free disk space"):
        write(tmp_path, TENSORS, 10**6)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_midway_leaves_no_folder_and_no_index(tmp_path, monkeypatch):
    calls = []

    def full_after_three(file, data, position):
        calls.append(position)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file, data, position)

    original = shard_writer._write_all
    monkeypatch.setattr(shard_writer, "_write_all", full_after_three)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_folder(tmp_path / "out", lambda folder: write(folder, TENSORS, 60))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_row_is_noticed(tmp_path):
    with ShardWriter(tmp_path, plan_shards(planned({"a": TENSORS["a"]}), 100)) as writer:
        writer.write("a", TENSORS["a"][:3])
        with pytest.raises(AssertionError, match="36 of 48 bytes"):
            writer.finish()


def test_a_name_that_comes_twice_and_a_type_without_a_code_are_refused():
    twice = [PlannedTensor("a", (1,), torch.float32)] * 2
    with pytest.raises(ConfigError, match="'a' comes twice"):
        plan_shards(twice, 10)
    with pytest.raises(ConfigError, match="complex64"):
        plan_shards([PlannedTensor("z", (1,), torch.complex64)], 10)


def test_the_null_sink_counts():
    sink = NullSink()
    for name, value in TENSORS.items():
        sink.write(name, value)
    assert sink.num_bytes == sum(value.nbytes for value in TENSORS.values())
    assert sink.num_values == sum(value.numel() for value in TENSORS.values())
