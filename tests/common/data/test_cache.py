"""Token caches: same tokens as in memory, keyed by content, whole or absent, safe with several processes."""

import dataclasses
import errno
import json
import multiprocessing
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from common.data import cache
from common.data.cache import TokenRecipe, load_or_build_tokens
from common.data.dataset import TokenDataset
from common.data.local_files import LocalFiles
from common.data.packing import pack
from common.data.sources import DocumentList
from common.data.tokenizer import ByteTokenizer
from common.errors import DataError

TEXTS = [f"document {i} has {'many ' * (i % 7)}words" for i in range(40)]
BYTES = ByteTokenizer()


def recipe(texts=TEXTS, **options):
    return TokenRecipe(source=DocumentList(texts, label="list"), tokenizer=BYTES, **options)


def build(cache_dir, texts=TEXTS, **options):
    return load_or_build_tokens(recipe(texts, **options), cache_dir, progress=False)


def dataset(stream, length=16):
    return TokenDataset(stream, length, vocab_size=128, name="list", split="train")


def caches(cache_dir):
    """Everything in the cache except lock files."""
    return sorted(path.name for path in (cache_dir / "tokens").iterdir() if path.suffix != ".lock")


class Upper:
    """A transformation that counts its calls in a file, over processes."""

    def __init__(self, log):
        self.log = log

    def __call__(self, text):
        with open(self.log, "a") as stream:
            stream.write("x")
        return text.upper()


class WideTokenizer(ByteTokenizer):
    """Ids beyond 16 bits."""

    vocab_size = 70_000

    def encode_batch(self, texts):
        return [[69_000 + i for i in self.encode(text)] for text in texts]

    def fingerprint(self):
        return "wide"


def test_blocks_equal_packing_in_memory_and_from_disk(tmp_path):
    blocks, dropped = pack(BYTES.encode_batch(TEXTS), 16, BYTES.eos_id)
    for cache_dir in (None, tmp_path, tmp_path):
        data = dataset(build(cache_dir))
        assert data.fetch(np.arange(len(data)))["tokens"].tolist() == blocks.tolist()
        assert data.info.dropped_tokens == dropped
        assert (data.info.documents, data.info.blocks) == (len(TEXTS), len(blocks))
        assert data.info.tokens == blocks.size + dropped


def test_groups_drop_their_remainders_and_the_loss_is_counted(tmp_path):
    blocks, dropped = pack(BYTES.encode_batch(TEXTS), 16, BYTES.eos_id, group_size=7)
    for cache_dir in (None, tmp_path, tmp_path):
        data = dataset(build(cache_dir, group_size=7, length=16))
        assert data.fetch(np.arange(len(data)))["tokens"].tolist() == blocks.tolist()
        assert data.info.dropped_tokens == dropped > 0
        assert data.info.tokens == blocks.size + dropped


def test_one_cache_serves_every_block_length(tmp_path):
    streams = [build(tmp_path), build(tmp_path)]
    assert len(caches(tmp_path)) == 1
    assert len(dataset(streams[0], 8)) == len(streams[0].tokens) // 8
    assert len(dataset(streams[1], 100)) == len(streams[1].tokens) // 100


def test_the_key_changes_with_every_input(tmp_path):
    keys = {
        recipe().key(),
        recipe([*TEXTS, ""]).key(),
        recipe(transform=str.upper, transform_name="upper").key(),
        recipe(group_size=7, length=16).key(),
        recipe(group_size=7, length=8).key(),
        TokenRecipe(source=DocumentList(TEXTS), tokenizer=WideTokenizer()).key(),
    }
    assert len(keys) == 6
    assert recipe().key() == recipe().key()


def test_a_changed_file_is_tokenized_again(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("first contents", "other contents"):
        path.write_text(text)
        stream = load_or_build_tokens(
            TokenRecipe(source=LocalFiles((path,)), tokenizer=BYTES), tmp_path, progress=False
        )
        assert BYTES.decode(stream.tokens[:-1]) == text


def test_ids_are_stored_in_as_few_bytes_as_the_vocabulary_needs(tmp_path):
    assert build(tmp_path).tokens.dtype == np.uint16
    wide = TokenRecipe(source=DocumentList(TEXTS), tokenizer=WideTokenizer())
    stream = load_or_build_tokens(wide, tmp_path, progress=False)
    assert stream.tokens.dtype == np.uint32
    assert stream.tokens.max() > 65_536


def test_the_second_use_does_not_tokenize(tmp_path):
    upper = Upper(tmp_path / "log")
    for _ in range(3):
        build(tmp_path, transform=upper, transform_name="upper")
    assert len((tmp_path / "log").read_text()) == len(TEXTS)


def test_the_manifest_describes_the_file(tmp_path):
    stream = build(tmp_path)
    manifest = json.loads((stream.path.parent / "manifest.json").read_text())
    assert manifest["bytes"] == stream.path.stat().st_size == 2 * manifest["tokens"]
    assert manifest["documents"] == len(TEXTS)
    assert len(manifest["sha256"]) == 64
    load_or_build_tokens(recipe(), tmp_path, progress=False, verify=True)


def truncate(folder):
    path = folder / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-2])


def flip_a_token(folder):
    path = folder / "tokens.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def break_manifest(folder):
    (folder / "manifest.json").write_text('{"key": ')


def empty_manifest(folder):
    (folder / "manifest.json").write_text("{}")


def lose_tokens(folder):
    (folder / "tokens.bin").unlink()


@pytest.mark.parametrize("damage", [truncate, flip_a_token, break_manifest, empty_manifest, lose_tokens])
def test_a_damaged_cache_is_rebuilt_with_a_warning_that_names_it(tmp_path, caplog, damage):
    stream = build(tmp_path)
    expected = np.array(stream.tokens)
    damage(stream.path.parent)
    again = build(tmp_path)
    np.testing.assert_array_equal(again.tokens, expected)
    assert f"{stream.path} is damaged" in caplog.text
    caplog.clear()
    build(tmp_path)
    assert not caplog.text
    assert caches(tmp_path) == [stream.path.parent.name]


def test_a_failure_while_tokenizing_leaves_no_cache(tmp_path):
    def broken(text):
        if "39" in text:
            raise DataError("the last document is damaged")
        return text

    with pytest.raises(DataError, match="the last document"):
        build(tmp_path, transform=broken, transform_name="broken")
    assert caches(tmp_path) == []


def test_a_full_disk_is_reported_and_leaves_nothing_behind(tmp_path, monkeypatch):
    before = build(tmp_path, ["kept"])

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot be written \(no space is left\); set data\.cache_dir"):
        build(tmp_path)
    assert caches(tmp_path) == [before.path.parent.name]


def test_a_cache_dir_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        build(tmp_path / "file")


def test_what_a_killed_builder_left_is_removed(tmp_path):
    name = build(tmp_path).path.parent.name
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    (tmp_path / "tokens" / name / "tokens.bin").unlink()
    leftover = tmp_path / "tokens" / f".{name}.tmp-{socket.gethostname()}-{process.pid}"
    leftover.mkdir()
    other_host = tmp_path / "tokens" / f".{name}.tmp-elsewhere-1"
    other_host.mkdir()
    build(tmp_path)
    assert not leftover.exists()
    assert other_host.exists()


def _build_in_child(cache_dir, log, barrier):
    barrier.wait()
    build(cache_dir, transform=Upper(log), transform_name="upper")


def test_of_several_processes_one_tokenizes_and_all_read(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    children = [context.Process(target=_build_in_child, args=(tmp_path, tmp_path / "log", barrier)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert len((tmp_path / "log").read_text()) == len(TEXTS)
    assert len(caches(tmp_path)) == 1


@pytest.mark.parametrize("cached", [False, True])
def test_a_source_without_documents_is_an_error(tmp_path, cached):
    with pytest.raises(DataError, match="holds no document"):
        build(tmp_path if cached else None, [])


def test_a_tokenizer_that_exceeds_its_vocabulary_is_an_error():
    class Broken(ByteTokenizer):
        vocab_size = 64

    with pytest.raises(DataError, match=r"gives id \d+ .* outside its vocabulary 0\.\.63"):
        load_or_build_tokens(TokenRecipe(source=DocumentList(TEXTS), tokenizer=Broken()), None, progress=False)


def test_many_small_chunks_give_the_same_stream_as_one(tmp_path, monkeypatch):
    whole = np.array(build(None).tokens)
    monkeypatch.setattr("common.data.cache.CHUNK_CHARACTERS", 50)
    np.testing.assert_array_equal(build(None).tokens, whole)
    monkeypatch.setattr("common.data.cache.CHUNK_DOCUMENTS", 1)
    np.testing.assert_array_equal(build(tmp_path).tokens, whole)


class _Stops:
    """A source that raises before document ``at`` the first time it is read."""

    label, num_documents = "stops", 20

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.at, self.error, self.read = at, error, []

    def documents(self):
        for number in range(20):
            if number == self.at:
                self.at = -1
                raise self.error
            self.read.append(number)
            yield f"document {number} " * (number + 1)

    def fingerprint(self) -> str:
        return "the same documents"


@pytest.mark.parametrize("grouping", [{}, {"group_size": 3, "length": 16}])
def test_an_interrupted_builder_is_continued_and_gives_the_same_tokens(tmp_path, monkeypatch, grouping):
    monkeypatch.setattr(cache, "CHUNK_DOCUMENTS", 2)
    monkeypatch.setattr(cache, "JOURNAL_SECONDS", 0.0)
    stopping = TokenRecipe(source=_Stops(-1, OSError), tokenizer=ByteTokenizer(), **grouping)
    whole = load_or_build_tokens(stopping, tmp_path / "whole")
    source = _Stops(9, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        load_or_build_tokens(dataclasses.replace(stopping, source=source), tmp_path / "cut")
    (left,) = (tmp_path / "cut" / "tokens").glob(".*.tmp-*")
    with (left / "tokens.bin").open("ab") as stream:
        stream.write(b"half a chunk")
    # as if by another process, which has ended
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left.rename(left.with_name(left.name.rsplit("-", 1)[0] + f"-{ended.pid}"))
    encoded = []
    monkeypatch.setattr(
        ByteTokenizer, "encode_batch", lambda self, texts: encoded.extend(texts) or [self.encode(t) for t in texts]
    )
    again = load_or_build_tokens(dataclasses.replace(stopping, source=source), tmp_path / "cut")
    np.testing.assert_array_equal(again.tokens, whole.tokens)
    assert (again.documents, again.total_tokens) == (20, whole.total_tokens)
    assert len(encoded) == 12, "only what came after the journal is tokenized"
    assert sorted(path.name for path in again.path.parent.iterdir()) == ["manifest.json", "tokens.bin"]
