"""Tokenizers: round trips, determinism, files that transformers reads, and clear errors."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.data.text import embedded_documents
from common.data.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
)
from common.errors import ConfigError, DataError

TEXTS = embedded_documents("test", "topics")
BPE = train_bpe(TEXTS, 400)
ASCII = st.text(st.characters(min_codepoint=1, max_codepoint=126))
NO_SURROGATES = st.text(st.characters(exclude_categories=["Cs"]))


@given(ASCII)
def test_bytes_round_trip_on_ascii_text(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text) == list(text.encode())


def test_bytes_are_clipped_to_127_and_special_ids_have_a_spelling():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é") == [127, 127]
    assert tokenizer.decode([72, 127, 0]) == f"H\N{REPLACEMENT CHARACTER}{END_OF_TEXT}"


@given(NO_SURROGATES)
def test_byte_pairs_round_trip_on_any_text(text):
    assert BPE.decode(BPE.encode(text)) == text


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["byte", "bpe"])
def test_every_id_and_any_mixture_of_ids_decodes(tokenizer):
    ids = torch.randint(tokenizer.vocab_size, (2000,), generator=torch.Generator().manual_seed(0))
    assert isinstance(tokenizer.decode(ids), str)
    for token in range(tokenizer.vocab_size):
        assert isinstance(tokenizer.decode([token]), str)
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["byte", "bpe"])
def test_the_protocol_holds(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert 0 <= tokenizer.eos_id < tokenizer.vocab_size
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []
    with pytest.raises(DataError, match=rf"Token id {tokenizer.vocab_size} .*mask token"):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(DataError, match="Token id -1"):
        tokenizer.decode([-1])


def test_byte_pairs_are_the_same_for_the_same_documents_and_shorter_than_bytes():
    assert train_bpe(iter(TEXTS), 400).fingerprint() == BPE.fingerprint()
    assert train_bpe(TEXTS[:4], 400).fingerprint() != BPE.fingerprint()
    assert BPE.vocab_size == 400
    assert BPE.eos_id == 0
    assert sum(map(len, BPE.encode_batch(TEXTS))) < 0.7 * sum(len(text.encode()) for text in TEXTS)


def test_a_saved_tokenizer_loads_here_and_in_transformers(tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = BPE.save(tmp_path / "bpe")
    for loaded in (
        load_tokenizer(folder),
        HuggingFaceTokenizer(AutoTokenizer.from_pretrained(folder)),
        HuggingFaceTokenizer(PreTrainedTokenizerFast.from_pretrained(folder)),
    ):
        assert loaded.fingerprint() == BPE.fingerprint()
        assert loaded.encode(TEXTS[0]) == BPE.encode(TEXTS[0])
    assert isinstance(load_tokenizer(ByteTokenizer().save(tmp_path / "byte")), ByteTokenizer)


def test_a_folder_in_gpt2_format_loads_with_gpt2_ids(tmp_path):
    raw = json.loads(BPE.tokenizer.backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(raw["vocab"]))
    merges = [" ".join(merge) for merge in raw["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(TEXTS[1]) == BPE.encode(TEXTS[1])
    assert (loaded.vocab_size, loaded.eos_id) == (BPE.vocab_size, BPE.eos_id)
    assert END_OF_TEXT in loaded.decode([5, 0])


def test_a_trained_tokenizer_is_kept_in_the_cache(tmp_path):
    first = load_tokenizer("bpe:300", documents=TEXTS, cache_dir=tmp_path)
    folders = list((tmp_path / "tokenizers").iterdir())
    assert [folder.name.split("-")[0] for folder in folders] == ["bpe300"]
    assert load_tokenizer("bpe:300", documents=TEXTS, cache_dir=tmp_path).fingerprint() == first.fingerprint()
    assert list((tmp_path / "tokenizers").iterdir()) == folders


def test_a_huge_corpus_is_learnt_from_its_beginning(monkeypatch):
    monkeypatch.setattr("common.data.tokenizer.MAX_BPE_CHARACTERS", len(TEXTS[0]) + 1)
    endless = (TEXTS[i % len(TEXTS)] for i in range(10**9))
    assert load_tokenizer("bpe:300", documents=endless).fingerprint() == train_bpe(TEXTS[:2], 300).fingerprint()


def test_saving_never_replaces_a_runs_tokenizer(tmp_path):
    folder = save_tokenizer(BPE, tmp_path / "tokenizer")
    save_tokenizer(ByteTokenizer(), folder)
    assert load_tokenizer(folder).fingerprint() == BPE.fingerprint()
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


@pytest.mark.parametrize("name, match", [("bpe:", "vocabulary size"), ("bpe:many", "bpe:2048"), ("bpe:100", "257")])
def test_an_unusable_vocabulary_size_is_refused(name, match):
    with pytest.raises(ConfigError, match=match):
        load_tokenizer(name, documents=TEXTS)


def test_no_documents_is_an_error():
    with pytest.raises(DataError, match="no document"):
        train_bpe([], 300)


def test_missing_and_damaged_folders_are_named_with_a_remedy(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "mod')
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match="holds no tokenizer that loads"):
        load_tokenizer(tmp_path)


def test_without_the_hub_the_message_says_how_to_use_a_folder(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="(?s)'no-such-owner/gpt2' .*copy its files .* to a folder"):
        load_tokenizer("no-such-owner/gpt2")


def test_a_tokenizer_without_end_of_text_is_refused():
    from tokenizers import Tokenizer as RawTokenizer
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    raw = PreTrainedTokenizerFast(tokenizer_object=RawTokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(DataError, match="no end-of-text token"):
        HuggingFaceTokenizer(raw)
