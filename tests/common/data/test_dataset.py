"""Blocks of a token stream as a dataset."""

import pickle

import pytest
import torch

from common.data.cache import TokenRecipe, load_or_build_tokens
from common.data.dataset import TokenDataset
from common.data.sources import DocumentList
from common.data.tokenizer import ByteTokenizer
from common.errors import ConfigError, DataError

TEXTS = [f"document {i} has {'many ' * (i % 7)}words" for i in range(40)]


def build(cache_dir, texts=TEXTS):
    recipe = TokenRecipe(source=DocumentList(texts), tokenizer=ByteTokenizer())
    return load_or_build_tokens(recipe, cache_dir, progress=False)


def dataset(stream, length=16):
    return TokenDataset(stream, length, vocab_size=128, name="list", split="train")


def test_rows_are_read_as_int64_in_any_order(tmp_path):
    data = dataset(build(tmp_path))
    rows = [5, 0, 5, len(data) - 1]
    tokens = data.fetch(torch.tensor(rows))["tokens"]
    assert tokens.dtype == torch.int64
    assert tokens.shape == (4, 16)
    for got, row in zip(tokens, rows):
        assert torch.equal(got, data[row]["tokens"])
    assert [sample["tokens"].tolist() for sample in data.__getitems__(rows)] == tokens.tolist()
    with pytest.raises(IndexError):
        data[len(data)]


def test_a_pickled_dataset_reopens_the_map_instead_of_carrying_tokens(tmp_path):
    texts = ["a long text " * 1000] * 20
    on_disk, in_memory = dataset(build(tmp_path, texts)), dataset(build(None, texts))
    assert len(pickle.dumps(on_disk)) < 2000
    for data in (on_disk, in_memory):
        copy = pickle.loads(pickle.dumps(data))
        assert copy.info == data.info
        assert torch.equal(copy.fetch([3, 1])["tokens"], data.fetch([3, 1])["tokens"])


def test_a_corpus_shorter_than_one_block_is_an_error():
    with pytest.raises(DataError, match=r"list \(train\) holds 7 tokens in 2 documents, fewer than .*length=16"):
        dataset(build(None, ["abc", "de"]))
    assert len(dataset(build(None, ["abc", "de"]), 7)) == 1
    with pytest.raises(ConfigError, match="length=0"):
        dataset(build(None), 0)
