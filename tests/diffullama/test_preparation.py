"""Preparation: what it writes is what training reads; it continues, keeps foreign files, and says what is wrong."""

import json
from pathlib import Path

import datasets
import pytest

from common.data.cache import text_chunks
from common.data.corpora import build_text_dataset
from common.data.tokenizer import ByteTokenizer
from common.errors import ConfigError, DataError
from diffullama import preparation
from diffullama.packed import STATE_FILE, find_packed, open_packed, read_header
from diffullama.pairs import load_pairs
from diffullama.preparation import PrepareConfig, prepare

TEXTS = [f"document {i} " * (i % 5) for i in range(40)]


@pytest.fixture
def fineweb(tmp_path: Path) -> Path:
    """A file as FineWeb's: text between identifiers and metadata."""
    path = tmp_path / "fine.jsonl"
    records = [{"id": f"<urn:{i}>", "text": text, "metadata": {"dump": "CC"}} for i, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def packed_config(fineweb: Path, tmp_path: Path, **options) -> PrepareConfig:
    values = {"length": 9, "blocks_per_file": 5, "output": str(tmp_path / "packed"), "tokenizer": "byte"}
    return PrepareConfig(source=str(fineweb), format="packed", progress=False, **values | options)


def joined(texts: list[str]) -> list[int]:
    return [token for text in texts for token in [*ByteTokenizer().encode(text), 0]]


# ---------------------------------------------------------------- what is written


def test_cached_tokens_are_those_that_training_finds(fineweb: Path, tmp_path: Path, monkeypatch):
    done = prepare(
        PrepareConfig(
            source=str(fineweb), tokenizer="byte", cache_dir=str(tmp_path / "data"), length=32, progress=False
        )
    )
    assert done.counts["tokens"] == len(joined(TEXTS))
    monkeypatch.setattr(ByteTokenizer, "encode_batch", lambda *_: pytest.fail("the cache was not found"))
    dataset = build_text_dataset(
        str(fineweb), "train", length=32, tokenizer=ByteTokenizer(), cache_dir=tmp_path / "data", progress=False
    )
    assert len(dataset) == done.counts["blocks of 32"]


def test_packed_files_hold_every_document_with_its_end(fineweb: Path, tmp_path: Path):
    done = prepare(packed_config(fineweb, tmp_path))
    tokens = [token for path in find_packed(done.folder) for token in read_header(path).tokens().tolist()]
    expected = joined(TEXTS)
    assert tokens == expected + [0] * done.counts["padding"]
    assert done.counts["documents"] == 40
    assert len(open_packed(done.folder, 9)) == 5 * done.counts["files"]
    assert prepare(packed_config(fineweb, tmp_path)).kept


def test_clean_text_has_nothing_but_text(fineweb: Path, tmp_path: Path):
    config = PrepareConfig(
        source=str(fineweb),
        format="jsonl",
        output=str(tmp_path / "clean"),
        documents_per_file=16,
        limit=35,
        progress=False,
    )
    done = prepare(config)
    files = sorted(done.folder.glob("*.jsonl"))
    assert [path.name for path in files] == [f"clean_train_{n:05d}.jsonl" for n in range(3)]
    records = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert records == [{"text": text} for text in TEXTS[:35] if text]
    assert done.counts["empty"] == 7
    assert prepare(config).kept
    # the folder is a source again
    again = PrepareConfig(source=str(done.folder), tokenizer="byte", cache_dir=str(tmp_path / "data"), length=8)
    assert prepare(again).counts["documents"] == 28


def test_pairs_are_read_by_training_without_options(tmp_path: Path):
    path = tmp_path / "in.jsonl"
    rows = [{"question": "1+1?", "answer": "2", "source": "a"}, {"question": "?", "answer": " ", "source": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"format": "pairs", "prompt_column": "question", "answer_column": "answer"}
    done = prepare(PrepareConfig(source=str(path), output=str(tmp_path / "pairs"), **options))
    assert done.counts == {"pairs": 1, "without answer": 1}
    written = str(done.folder / "train.jsonl")
    assert load_pairs(written, "train", prompt_column="instruction", answer_column="output") == [("1+1?", "2")]


def test_hub_data_are_streamed_up_to_the_limit(tmp_path: Path, monkeypatch):
    read = []

    def records():
        for number, text in enumerate(TEXTS):
            read.append(number)
            yield {"id": number, "text": text}

    stream = datasets.IterableDataset.from_generator(records)
    asked = []
    monkeypatch.setattr(preparation, "load_hub_dataset", lambda *a, **k: asked.append((a, k)) or stream)
    done = prepare(
        PrepareConfig(source="fineweb", format="jsonl", output=str(tmp_path / "out"), limit=6, progress=False)
    )
    assert asked == [
        (("HuggingFaceFW/fineweb", "sample-100BT", "train"), {"cache_dir": None, "streaming": True}),
    ]
    assert done.counts["documents"] == 6
    assert max(read) < 10
    with pytest.raises(ConfigError, match="fineweb has no test split"):
        prepare(PrepareConfig(source="fineweb", split="test", format="jsonl", output=str(tmp_path / "out2")))


# ---------------------------------------------------------------- interruption


@pytest.mark.parametrize("cut", [1, 7, 23])
def test_stopped_packing_continues_to_the_same_files(fineweb: Path, tmp_path: Path, monkeypatch, cut: int):
    whole = prepare(packed_config(fineweb, tmp_path, output=str(tmp_path / "whole")))
    monkeypatch.setattr(preparation, "text_chunks", lambda texts: ([text] for text in texts))
    encode, seen = ByteTokenizer.encode_batch, []

    def failing(self, texts):
        seen.extend(texts)
        if len(seen) == cut:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(ByteTokenizer, "encode_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare(packed_config(fineweb, tmp_path))
    folder = tmp_path / "packed"
    with pytest.raises(DataError, match="not prepared to its end"):
        open_packed(folder, 9)
    # as if the kill had come between a file and its entry
    number = json.loads((folder / STATE_FILE).read_text())["position"]["files"]
    (folder / f"train_{number:010d}.bin").write_bytes(b"written, not accounted for")
    seen.clear()
    seen.extend([""] * 100)
    done = prepare(packed_config(fineweb, tmp_path))
    assert cut == 1 or len(seen) - 100 < 40, "documents before the last complete file are not tokenized again"
    assert done.counts == whole.counts
    for one, other in zip(find_packed(done.folder), find_packed(whole.folder), strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert not (folder / preparation.LOCK_FILE).exists()


def test_chunks_hold_all_texts_in_order():
    assert [text for chunk in text_chunks(TEXTS) for text in chunk] == TEXTS


# ---------------------------------------------------------------- refusals


def test_folders_with_other_contents_stay_as_they_are(fineweb: Path, tmp_path: Path):
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="notes.txt, not written by"):
        prepare(packed_config(fineweb, tmp_path))
    (folder / "notes.txt").unlink()
    prepare(packed_config(fineweb, tmp_path))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DataError, match="chunk_size: 45 -> 36"):
        prepare(packed_config(fineweb, tmp_path, blocks_per_file=4))
    fineweb.write_text(fineweb.read_text().replace("document 3", "document III"))
    with pytest.raises(DataError, match="contents of the data or tokenizer differ"):
        prepare(packed_config(fineweb, tmp_path))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "packed", "output": "x"}, "needs tokenizer="),
        ({"format": "packed", "tokenizer": "byte"}, "needs output="),
        ({"tokenizer": "byte", "output": "x"}, "takes no output"),
        ({"tokenizer": "byte", "limit": 3}, "takes no limit"),
        ({"format": "parquet"}, "format='parquet'"),
        ({"source": ""}, "source is empty"),
        ({"format": "packed", "tokenizer": "byte", "output": "x", "length": 0}, "length=0"),
        ({"format": "packed", "tokenizer": "byte", "output": "x", "dtype": "float32"}, "dtype='float32'"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        PrepareConfig(**options)


def test_byte_tokens_have_no_beginning(fineweb: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="no begin-of-text token"):
        prepare(packed_config(fineweb, tmp_path, bos=True))
