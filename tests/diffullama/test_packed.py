"""Packed token files: the reference's bytes and order, refusals, and use through the loader."""

import pickle
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.data.loader import build_train_loader
from common.errors import ConfigError, DataError
from diffullama.packed import (
    CODES,
    HEADER,
    PackedReader,
    PackedWriter,
    dtype_for,
    encode_header,
    files_of_rank,
    find_packed,
    open_packed,
    read_header,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files of 10 tokens: 0..24 and a padding of 99."""
    with PackedWriter(tmp_path / "packed", "train", chunk_size=10, sep_token=99, vocab_size=100) as writer:
        writer.add(np.arange(7))
        writer.add(list(range(7, 25)))
    return tmp_path / "packed"


# ---------------------------------------------------------------- format


def test_header_is_the_24_bytes_of_the_format():
    assert HEADER.size == 24
    assert encode_header(np.uint16, 40) == b"LITPKDS" + struct.pack("<Q", 1) + b"\x08" + struct.pack("<Q", 40)


def test_last_file_is_padded_and_an_exact_fit_adds_none(folder: Path, tmp_path: Path):
    assert [path.name for path in find_packed(folder)] == [f"train_{n:010d}.bin" for n in range(3)]
    assert read_header(find_packed(folder)[-1]).tokens().tolist() == [*range(20, 25), *[99] * 5]
    with PackedWriter(tmp_path / "exact", "x", chunk_size=5, sep_token=0, vocab_size=100) as writer:
        assert writer.add(np.ones(10)) == 2
    assert len(find_packed(tmp_path / "exact")) == 2


@pytest.mark.parametrize("dtype", [kind for kind in CODES.values() if np.dtype(kind).kind in "iu"])
def test_reader_follows_the_number_type_of_the_header(tmp_path: Path, dtype: type):
    tokens = [0, 1, np.iinfo(dtype).max - 1, np.iinfo(dtype).max]
    with PackedWriter(tmp_path, "x", chunk_size=4, sep_token=0, dtype=dtype) as writer:
        writer.add(np.array(tokens, dtype=dtype))
    file = read_header(tmp_path / "x_0000000000.bin")
    assert file.dtype == np.dtype(dtype)
    assert file.tokens().tolist() == tokens
    if np.dtype(dtype) != np.uint64:
        assert open_packed(tmp_path, 2).fetch([1])["tokens"].tolist() == [tokens[2:]]


def test_automatic_type_is_16_bits_below_65500_ids():
    assert dtype_for(65499) == np.uint16
    assert dtype_for(65500) == np.int32


@given(
    st.lists(st.lists(st.integers(0, 255), max_size=20), max_size=6),
    st.integers(1, 12),
    st.integers(1, 7),
)
def test_written_tokens_are_read_back_up_to_the_tails(tmp_path_factory, documents, chunk_size, length):
    tmp_path = tmp_path_factory.mktemp("packed")
    with PackedWriter(tmp_path, "x", chunk_size=chunk_size, sep_token=7, vocab_size=256) as writer:
        for document in documents:
            writer.add(document)
    stream = [token for document in documents for token in document]
    stream += [7] * (-len(stream) % chunk_size)
    files = [stream[start : start + chunk_size] for start in range(0, len(stream), chunk_size)]
    expected = [f[s : s + length] for f in files for s in range(0, chunk_size // length * length, length)]
    if expected:
        dataset = open_packed(tmp_path, length)
        assert dataset.fetch(range(len(dataset)))["tokens"].tolist() == expected
        paths = find_packed(tmp_path)
        assert [block.tolist() for block in PackedReader(paths, length, n_chunks=2)] == expected


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"PK\x03\x04" + data[4:], "not a packed token file"),
        (lambda data: data[:7] + struct.pack("<Q", 2) + data[15:], "version 2"),
        (lambda data: data[:15] + b"\x0c" + data[16:], "unknown number type 12"),
        (lambda data: data[:15] + b"\x06" + data[16:], "no token ids"),
        (lambda data: data[:-1], "truncated"),
        (lambda data: data[:20], "not a whole header"),
        (lambda data: data + b"\0", "damaged"),
        (lambda data: b"", "not a packed token file"),
    ],
)
def test_damaged_files_are_refused_with_their_name(folder: Path, damage, message: str):
    path = find_packed(folder)[1]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        open_packed(folder, 5)
    assert path.name in str(caught.value)


def test_nothing_is_overwritten(folder: Path):
    before = {path: path.read_bytes() for path in find_packed(folder)}
    with pytest.raises(DataError, match="not overwritten"):
        PackedWriter(folder, "train", chunk_size=10, sep_token=0, vocab_size=100)
    with PackedWriter(folder, "train", chunk_size=10, sep_token=0, vocab_size=100, first_file=3) as writer:
        writer.add([1])
    assert {path: path.read_bytes() for path in before} == before
    assert len(find_packed(folder)) == 4


def test_an_error_inside_the_block_leaves_only_whole_files(tmp_path: Path):
    def write(*documents: list[int]) -> None:
        with PackedWriter(tmp_path, "x", chunk_size=2, sep_token=0, dtype=np.uint8) as writer:
            for document in documents:
                writer.add(document)

    with pytest.raises(DataError, match="300 does not fit uint8"):
        write([1, 2, 3], [300])
    assert [path.name for path in tmp_path.iterdir()] == ["x_0000000000.bin"]


def test_options_that_cannot_work_are_refused(folder: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="vocab_size"):
        PackedWriter(tmp_path, "x", chunk_size=2, sep_token=0)
    with pytest.raises(ConfigError, match="float16"):
        PackedWriter(tmp_path, "x", chunk_size=2, sep_token=0, dtype=np.float16)
    with pytest.raises(DataError, match="smaller length"):
        open_packed(folder, 11)
    with pytest.raises(DataError, match="no block of 11"):
        PackedReader(find_packed(folder), 11)
    with pytest.raises(DataError, match="No packed file"):
        open_packed(tmp_path / "none", 4)
    with pytest.raises(DataError, match="99, outside the model's vocabulary 0..49"):
        open_packed(folder, 5, vocab_size=50)
    with pytest.raises(IndexError):
        open_packed(folder, 5).fetch([6])


# ---------------------------------------------------------------- order


def test_reader_continues_where_it_stopped(folder: Path):
    def reader() -> PackedReader:
        return PackedReader(find_packed(folder), 2, n_chunks=2, seed=3, wrap=True)

    def take(source: PackedReader, count: int) -> list[list[int]]:
        return [block.tolist() for block, _ in zip(source, range(count), strict=False)]

    whole = take(reader(), 40)
    assert sorted(whole[:15]) == sorted(block.tolist() for block in PackedReader(find_packed(folder), 2))
    assert whole[15:30] != whole[:15]
    for cut in (0, 1, 9, 10, 15, 22):
        first = reader()
        head = []
        for _, block in zip(range(cut), first, strict=False):
            head.append(block.tolist())
        second = reader()
        second.load_state_dict({"position": cut})
        assert head + take(second, 40 - cut) == whole


def test_ranks_share_the_files_out():
    paths = [Path(f"{n}.bin") for n in range(11)]
    shares = [files_of_rank(paths, rank, 4, seed=5) for rank in range(4)]
    assert [len(share) for share in shares] == [2, 2, 2, 2]
    shuffled = list(paths)
    random.Random(5).shuffle(shuffled)
    assert sorted(path for share in shares for path in share) == sorted(shuffled[:8])
    assert files_of_rank(paths) == paths


def test_packed_data_through_the_loader_in_workers_and_ranks(folder: Path):
    dataset = open_packed(folder, 5)
    assert (len(dataset), dataset.info.tokens, dataset.info.dropped_tokens) == (6, 30, 0)
    assert pickle.loads(pickle.dumps(dataset)).fetch([5, 0])["tokens"].tolist() == [[99] * 5, [0, 1, 2, 3, 4]]

    def batches(count: int, **options) -> list[list[list[int]]]:
        loader = build_train_loader(dataset, global_size=2, seed=1, **{"micro_size": 2, **options})
        return [batch["tokens"].tolist() for batch, _ in zip(loader, range(count), strict=False)]

    alone = batches(6)
    assert sorted(row for batch in alone[:3] for row in batch) == sorted(dataset.fetch(range(6))["tokens"].tolist())
    ranks = [batches(6, micro_size=1, rank=rank, world_size=2) for rank in range(2)]
    assert [[one[0], other[0]] for one, other in zip(*ranks, strict=True)] == alone
    assert batches(6, num_workers=1) == alone
