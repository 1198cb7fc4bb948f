"""Local files: what each kind yields, and one clear error for each kind of bad input."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.data.fingerprint import file_fingerprint
from common.data.local_files import LocalFiles, find_files
from common.errors import ConfigError, DataError

TEXTS = ["first text", "", "zweiter Text, mit Umlaut: ü", "line one\nline two"]


def write_jsonl(path, records):
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path, columns):
    pq.write_table(pa.table(columns), path)
    return path


def read(path, **options):
    return list(LocalFiles(tuple(find_files(str(path))), **options).documents())


def test_every_format_yields_the_same_documents(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    write_jsonl(tmp_path / "a.jsonl.gz", [{"id": 1, "text": text} for text in TEXTS])
    write_parquet(tmp_path / "a.parquet", {"id": range(4), "text": TEXTS})
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        assert read(tmp_path / name) == TEXTS


@pytest.mark.parametrize(
    "unit, expected",
    [
        ("file", ["a b\n c \n\nd\n"]),
        ("paragraph", ["a b\n c \n", "d\n"]),
        ("line", ["a b", "c", "", "d"]),
        ("full_line", ["a b\n", " c \n", "", "d\n"]),
    ],
)
def test_a_text_file_is_one_document_or_many(tmp_path, unit, expected):
    (tmp_path / "a.txt").write_text("a b\n c \n\nd\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfa b\n c \n\nd\n"))  # with a byte-order mark
    assert read(tmp_path / "a.txt", unit=unit) == read(tmp_path / "a.txt.gz", unit=unit) == expected


def test_files_are_read_in_sorted_order_from_patterns_and_folders(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert read(tmp_path / "**" / "*.txt") == read(tmp_path) == ["a.txt", "b.txt", "sub/c.txt"]


def test_descriptions_and_hidden_files_of_a_downloaded_folder_are_not_data(tmp_path):
    write_parquet(tmp_path / "test-00000-of-00001.parquet", {"text": TEXTS})
    for name in ("README.md", "LICENSE.txt", "dataset_info.json", ".cache.json"):
        (tmp_path / name).write_text("{}")
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize(
    "train, test",
    [
        ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"),
        ("train/0.txt", "test/0.txt"),
        ("wiki.train.txt", "wiki.test.txt"),
        ("lambada_train.jsonl", "lambada_test.jsonl"),
    ],
)
def test_a_folder_with_named_splits_gives_the_one_asked_for(tmp_path, train, test):
    for name in (train, test):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert find_files(str(tmp_path), split="test") == [tmp_path / test]
    assert find_files(str(tmp_path), split="train") == [tmp_path / train]
    with pytest.raises(DataError, match="files for test, train but none for the split 'validation'"):
        find_files(str(tmp_path), split="validation")


def test_fingerprints_follow_contents_not_names(tmp_path):
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.txt").write_text("same")
    a, b = (LocalFiles((tmp_path / name,)) for name in ("a.txt", "b.txt"))
    assert a.fingerprint() == b.fingerprint()
    assert a.fingerprint() != LocalFiles(a.paths, unit="line").fingerprint()
    (tmp_path / "b.txt").write_text("sbme")
    assert a.fingerprint() != b.fingerprint()


def test_large_files_are_sampled_and_still_notice_size_and_edges(tmp_path, monkeypatch):
    monkeypatch.setattr("common.data.fingerprint.WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr("common.data.fingerprint.WINDOW_BYTES", 16)
    path, data = tmp_path / "large", bytearray(os.urandom(5000))
    path.write_bytes(data)
    before = file_fingerprint(path)
    for changed in (data[:-1], data + b"x", data[:-1] + bytes([data[-1] ^ 1]), bytes([data[0] ^ 1]) + data[1:]):
        path.write_bytes(changed)
        assert file_fingerprint(path) != before


# ---------------------------------------------------------------- bad input


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"No file matches '.*nothing-\*\.txt'"):
        find_files(str(tmp_path / "nothing-*.txt"))
    with pytest.raises(DataError, match="holds no txt, jsonl or parquet files"):
        find_files(str(tmp_path))


def test_unreadable_endings_and_mixtures_are_refused(tmp_path):
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(DataError, match=r"a\.docx has an ending that is not read"):
        find_files(str(tmp_path / "a.docx"))
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(DataError, match="mixes kinds of files"):
        find_files(str(tmp_path))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=f"{name} is empty"):
        read(tmp_path / name)


def test_an_empty_file_among_others_is_an_empty_document_with_a_warning(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("b")
    assert read(tmp_path) == ["", "b"]
    assert "a.txt is empty" in caplog.text


@pytest.mark.parametrize("unit", ["file", "line"])
@pytest.mark.parametrize(
    "data, match", [(b"\x89PNG\r\n\x1a\n\xff\xfe", "not UTF-8 text: byte 0x89"), (b"text\0text", "looks like a binary")]
)
def test_a_binary_file_is_recognized(tmp_path, data, match, unit):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.txt .*{match}"):
        read(tmp_path / "a.txt", unit=unit)


def test_a_truncated_jsonl_names_the_line(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.jsonl, line 4: not valid JSON .*cut off"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz"])
def test_a_truncated_gzip_file_is_recognized(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(os.urandom(4000).hex().encode())[:-500])
    with pytest.raises(DataError, match="truncated or damaged"):
        read(tmp_path / name)


@pytest.mark.parametrize("keep", [20, -20])
def test_a_truncated_parquet_is_recognized(tmp_path, keep):
    path = write_parquet(tmp_path / "a.parquet", {"text": TEXTS * 100})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"a\.parquet is not a complete parquet file"):
        read(path)


def test_a_parquet_with_damaged_pages_names_the_row(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": [os.urandom(20).hex() for _ in range(4000)]})
    data = bytearray(path.read_bytes())
    data[20:4000] = b"\xff" * 3980
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet is damaged after row 0"):
        read(path)


def test_a_wrong_field_lists_those_that_exist(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "content": "x"}])
    write_parquet(tmp_path / "a.parquet", {"id": [1], "content": ["x"]})
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: has no field 'text'; its fields are id, content"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.parquet: has no column 'text'; its columns are id, content"):
        read(tmp_path / "a.parquet")
    assert read(tmp_path / "a.jsonl", fields=("content",)) == read(tmp_path / "a.parquet", fields=("content",))


def test_values_that_are_not_text_are_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": 7}])
    write_jsonl(tmp_path / "list.jsonl", [["x"]])
    write_parquet(tmp_path / "a.parquet", {"text": ["x", None]})
    with pytest.raises(DataError, match="line 2: field 'text' holds int"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="line 1: holds a list"):
        read(tmp_path / "list.jsonl")
    with pytest.raises(DataError, match="row 1: column 'text' holds NoneType"):
        read(tmp_path / "a.parquet")


def test_an_unknown_unit_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match="text_unit='page'"):
        LocalFiles((tmp_path / "a.txt",), unit="page")
