"""RADD's corpora by name: splits, columns, detokenizers, parity options, and one clear error for bad input."""

import json

import datasets
import pytest

from common.data.corpora import (
    CORPORA,
    build_text_dataset,
    build_text_stream,
    load_data_tokenizer,
    open_source,
    parse_name,
)
from common.data.detokenizers import ptb_detokenizer, wikitext_detokenizer
from common.data.hub import HubDataset
from common.data.packing import pack
from common.data.text import embedded_documents
from common.data.tokenizer import ByteTokenizer, load_tokenizer
from common.errors import ConfigError, DataError

BYTES = ByteTokenizer()
PTB = ["mr. <unk> is chairman", "the company 's profit rose N N", "they did n't say"]


def build(name, split="test", **options):
    options = {"length": 8, "tokenizer": "byte", "cache_dir": None, "progress": False} | options
    return build_text_dataset(name, split, **options)


def text_of(dataset):
    return BYTES.decode(dataset.fetch(list(range(len(dataset))))["tokens"].reshape(-1))


def expected(texts, length=8, **options):
    return BYTES.decode(pack(BYTES.encode_batch(texts), length, BYTES.eos_id, **options)[0].reshape(-1))


def test_embedded_splits_are_those_of_the_specification(tmp_path):
    for source in ("topics", "all"):
        name = f"embedded:{source}" if source != "all" else "embedded"
        for split, documents in (("train", "train"), ("test", "test"), ("validation", "test")):
            data = build(name, split, length=64, cache_dir=tmp_path)
            assert data.info.documents == len(embedded_documents(documents, source))
            assert data.info.tokens == data.info.blocks * 64 + data.info.dropped_tokens
            assert data.info.vocab_size == 128


@pytest.mark.parametrize(
    "text, kind, name, target, column",
    [
        ("embedded", "embedded", "embedded", "all", None),
        ("embedded:topics", "embedded", "embedded", "topics", None),
        ("wikitext2", "corpus", "wikitext2", "", None),
        ("openwebtext::body", "corpus", "openwebtext", "", "body"),
        ("ptb=/corpora/ptb/*.txt", "path", "ptb", "/corpora/ptb/*.txt", None),
        ("ptb:/corpora/ptb/*.txt", "path", "ptb", "/corpora/ptb/*.txt", None),
        ("mine=texts.jsonl::content", "path", "mine", "texts.jsonl", "content"),
        ("texts/a.parquet", "path", "", "texts/a.parquet", None),
        ("/hive/split=train/*.parquet", "path", "", "/hive/split=train/*.parquet", None),
        ("./folder", "path", "", "./folder", None),
        ("owner/set", "hub", "set", "owner/set", None),
        ("Salesforce/wikitext:wikitext-2-v1", "hub", "wikitext", "Salesforce/wikitext:wikitext-2-v1", None),
    ],
)
def test_names_are_read_as_documented(text, kind, name, target, column):
    parsed = parse_name(text)
    assert (parsed.kind, parsed.name, parsed.target, parsed.column) == (kind, name, target, column)


def test_an_unknown_name_gets_the_nearest_known_one():
    with pytest.raises(ConfigError, match=r"did you mean 'wikitext103'\? Known: embedded, wikitext103"):
        build("wikitex103")
    with pytest.raises(ConfigError, match="one of topics, docstrings, all"):
        build("embedded:news")


def test_a_corpus_from_local_files_gets_its_columns_and_detokenizer(tmp_path):
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"sentence": text}) + "\n" for text in PTB))
    (tmp_path / "test.txt").write_text("".join(f" {text} \n" for text in PTB))
    for file in ("test.jsonl", "test.txt"):
        data = build(f"ptb={tmp_path / file}")
        assert data.info.documents == 3
        assert text_of(data) == expected([ptb_detokenizer(text) for text in PTB])
    assert text_of(build(f"ptb={tmp_path / 'test.jsonl'}", detokenizer="none")) == expected(PTB)
    assert text_of(build(f"{tmp_path / 'test.jsonl'}::sentence")) == expected(PTB)


def test_wikitext_files_give_the_rows_of_the_hub(tmp_path):
    (tmp_path / "wiki.test.raw").write_text(" \n = Title = \n \n A well @-@ known game . \n")
    rows = ["", " = Title = \n", "", " A well @-@ known game . \n"]
    data = build(f"wikitext2={tmp_path / 'wiki.test.raw'}")
    assert text_of(data) == expected([wikitext_detokenizer(row) for row in rows])


def test_known_corpora_ask_the_hub_for_the_right_split(monkeypatch):
    asked = []

    def load(repository, config, split, *, cache_dir, streaming=False):
        asked.append((repository, config, split))
        column = CORPORA["ptb"].fields[0] if "ptb" in repository else "text"
        return datasets.Dataset.from_dict({column: ["some text"] * 4})

    monkeypatch.setattr("common.data.corpora.load_hub_dataset", load)
    for name, split in (
        ("wikitext2", "test"),
        ("wikitext2", "train"),
        ("wikitext103", "validation"),
        ("ptb", "test"),
        ("lm1b", "test"),
        ("lm1b", "validation"),
        ("lambada", "test"),
        ("openwebtext", "train"),
        ("owner/name:config", "test"),
    ):
        assert isinstance(open_source(name, split), HubDataset)
        assert len(build(name, split)) == 5
    assert [entry[1:] for entry in asked[::2]] == [
        ("wikitext-2-raw-v1", "test"),
        ("wikitext-2-raw-v1", "train"),
        ("wikitext-103-raw-v1", "validation"),
        (None, "test"),
        (None, "test"),
        (None, "test"),
        ("default", "test"),
        (None, "train"),
        ("config", "test"),
    ]


@pytest.mark.parametrize(
    "name, split, match",
    [
        ("openwebtext", "validation", "no validation split, only train; use data.valid=wikitext103"),
        ("lambada", "train", "no train split"),
        ("embedded", "dev", "split='dev' must be one of train, validation, test"),
    ],
)
def test_a_split_that_does_not_exist_is_refused(name, split, match):
    with pytest.raises(ConfigError, match=match):
        build(name, split)


def test_a_folder_saved_by_datasets_serves_both_ways_of_reading(tmp_path):
    texts = [f"text {i}" for i in range(30)]
    train = datasets.Dataset.from_dict({"text": texts})
    datasets.DatasetDict({"train": train, "test": train.select(range(5))}).save_to_disk(tmp_path / "saved")
    assert text_of(build(f"mine={tmp_path / 'saved'}", "test")) == expected(texts[:5])
    assert build(str(tmp_path / "saved"), "train").info.documents == 30
    options = {"length": 7, "tokenizer": BYTES, "micro_size": 2, "seed": 0, "window_blocks": 8}
    batch = next(iter(build_text_stream(f"mine={tmp_path / 'saved'}", **options)))
    assert batch["tokens"].shape == (2, 7)
    with pytest.raises(ConfigError, match="in memory already"):
        build_text_stream("embedded", **options)


def test_a_stream_applies_the_corpus_detokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("the company 's profit\n" * 50)
    options = {"length": 21, "tokenizer": BYTES, "micro_size": 2, "seed": 0, "window_blocks": 8}
    batch = next(iter(build_text_stream(f"ptb={tmp_path / 'a.txt'}", **options)))
    assert [BYTES.decode(row[:-1]) for row in batch["tokens"]] == ["the company's profit"] * 2


def test_groups_of_documents_drop_their_remainders_for_parity(tmp_path):
    texts = ["abcdefghij"] * 7
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for cache_dir in (None, tmp_path / "cache"):
        data = build(str(tmp_path / "a.jsonl"), group_size=3, cache_dir=cache_dir)
        assert text_of(data) == expected(texts, group_size=3)
        assert data.info.dropped_tokens == 1 + 1 + 3
        assert build(str(tmp_path / "a.jsonl"), cache_dir=cache_dir).info.dropped_tokens == 77 % 8


def test_the_detokenizer_and_the_tokenizer_enter_the_cache_key(tmp_path):
    (tmp_path / "a.txt").write_text("the company 's profit\n" * 5)
    name, cache_dir = f"ptb={tmp_path / 'a.txt'}", tmp_path / "cache"
    folders = {
        build(name, cache_dir=cache_dir, **options).info.cache
        for options in ({}, {"detokenizer": "none"}, {"tokenizer": "bpe:260"}, {"text_unit": "file"}, {})
    }
    assert len(folders) == 4


def test_byte_pairs_learn_from_the_training_split_and_are_reused(tmp_path):
    one = load_data_tokenizer("bpe:300", "embedded:topics", cache_dir=tmp_path)
    two = load_data_tokenizer("bpe:300", "embedded:topics", cache_dir=tmp_path)
    assert one.fingerprint() == two.fingerprint()
    assert load_tokenizer("bpe:300", documents=embedded_documents("train", "topics")).fingerprint() == one.fingerprint()
    assert isinstance(load_data_tokenizer("byte", "embedded", cache_dir=None), ByteTokenizer)


@pytest.mark.parametrize(
    "contents, match",
    [
        (None, r"No file matches '.*a\.jsonl'"),
        (b"", r"a\.jsonl is empty \(0 bytes\)"),
        (b'{"text": "fine and long"}\n{"text": "cut o', "line 2: not valid JSON .*cut off"),
        (b"\xff\xfe\x00binary", "not UTF-8 text"),
        (b'{"body": "wrong field"}\n', "no field 'text'; its fields are body.*::COLUMN"),
        (b'{"text": "abc"}\n', "holds 4 tokens in 1 documents, fewer than one block of length=8"),
    ],
    ids=["missing", "empty", "truncated", "binary", "wrong field", "short"],
)
def test_bad_files_end_in_one_data_error_and_leave_no_cache(tmp_path, contents, match):
    path = tmp_path / "a.jsonl"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(DataError, match=match) as error:
        build(str(path), cache_dir=tmp_path / "cache")
    assert "\n" not in str(error.value)
    tokens = tmp_path / "cache" / "tokens"
    kept = [folder for folder in tokens.iterdir() if folder.is_dir()] if tokens.exists() else []
    assert len(kept) == (1 if contents and b"abc" in contents else 0)


@pytest.mark.parametrize("option, match", [({"length": 0}, "length=0"), ({"group_size": 0}, "data.group_size=0")])
def test_sizes_below_one_are_refused(option, match):
    with pytest.raises(ConfigError, match=match):
        build("embedded:topics", **option)
