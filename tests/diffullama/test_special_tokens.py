"""Every model knows its mask or asks for one; an added one gets a row of its own."""

import pytest
import torch

from common.data.tokenizer import ByteTokenizer, train_bpe
from common.errors import ConfigError
from common.seeding import generator
from diffullama.special_tokens import FAMILIES as FAMILIES_OF_RELEASES
from diffullama.special_tokens import add_mask_token, isolate_digits, resolve_special_tokens
from tests.diffullama.hub_folders import (
    FAMILIES,
    VOCAB,
    tiny_hf,
    tiny_tokenizer,
)

SMALL = {"n_embd": 768, "n_layer": 12, "vocab_size": 50257}
MEDIUM = {"n_embd": 1024, "n_layer": 24, "vocab_size": 50258}


@pytest.mark.parametrize(
    "family, sizes, expected",
    [
        ("gpt2", SMALL, (10541, 50256, 50256, 50155)),
        ("gpt2", MEDIUM, (50257, 50256, 101, None)),  # the separator is looked up in the tokenizer
        ("llama", {"vocab_size": 32000}, (811, 2, 30399, 4936)),
    ],
)
def test_released_families_know_their_special_tokens(family, sizes, expected):
    _, config_class, _ = FAMILIES[family]
    special = resolve_special_tokens(None, config_class(**sizes))
    assert (special.mask_id, special.eos_id, special.pad_id, special.sep_id) == expected


@pytest.mark.parametrize(
    "family, sizes",
    [
        ("gpt2", {**SMALL, "n_layer": 6}),
        ("gpt2", {"n_embd": 1280, "n_layer": 36, "vocab_size": 50257}),
        ("gpt2", {**MEDIUM, "vocab_size": 50257}),  # its mask has to be added first
        ("llama", {"vocab_size": 128256}),
        ("mistral", {"vocab_size": 32000}),
        ("qwen2", {"vocab_size": 151936}),
    ],
)
def test_other_models_have_to_be_told_their_mask(family, sizes):
    _, config_class, _ = FAMILIES[family]
    with pytest.raises(ConfigError, match="mask_token_id=... or add_mask_token=true|mask_token_id=..., or\\s+add_mask"):
        resolve_special_tokens(None, config_class(**sizes))
    assert resolve_special_tokens(None, config_class(**sizes), require_mask=False).mask_id is None
    assert resolve_special_tokens(None, config_class(**sizes), mask_token_id=7).mask_id == 7


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_added_mask_grows_model_and_tokenizer_by_one(family):
    tokenizer = tiny_tokenizer()
    size = tokenizer.vocab_size
    hf = tiny_hf(family, vocab_size=size)
    before = hf.get_input_embeddings().weight.detach().clone()
    mask_id = add_mask_token(hf, tokenizer, generator(1, "mask row"))
    weight = hf.get_input_embeddings().weight
    assert mask_id == size == len(weight) - 1 and tokenizer.vocab_size == size + 1
    assert torch.equal(weight[:size], before)
    assert (weight[mask_id] - before.mean(0)).norm().item() == pytest.approx(1, abs=0.6)  # noise of variance 1 / D
    assert (hf.get_output_embeddings().weight is weight) == (family == "gpt2")
    assert len(hf.get_output_embeddings().weight) == size + 1
    assert add_mask_token(hf, tokenizer, generator(1, "mask row")) == mask_id  # a second time nothing happens
    assert resolve_special_tokens(tokenizer, hf.config).mask_id == mask_id
    assert tokenizer.encode("the") == tiny_tokenizer().encode("the")


def test_an_added_mask_takes_a_spare_row_where_there_is_one():
    tokenizer, hf = tiny_tokenizer(), tiny_hf("llama", vocab_size=512)
    before = hf.lm_head.weight.detach().clone()
    mask_id = add_mask_token(hf, tokenizer, generator(1, "mask row"))
    assert len(hf.get_input_embeddings().weight) == 512 and mask_id < 512
    changed = (hf.lm_head.weight != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == [mask_id]
    byte_model = tiny_hf("gpt2", vocab_size=128)
    assert add_mask_token(byte_model, ByteTokenizer(), generator(1, "mask row")) == 128
    assert byte_model.config.vocab_size == 129


def test_both_ways_of_naming_a_mask_at_once_are_refused():
    with pytest.raises(ConfigError, match="contradict"):
        resolve_special_tokens(None, tiny_hf("gpt2").config, mask_token_id=3, add_mask_token=True)


def test_digits_become_one_token_each_where_a_family_wants_that():
    tokenizer = train_bpe(["2024 2024 2024 and 1024 1024"] * 8, VOCAB)
    assert len(tokenizer.encode("2024")) < 4
    isolated = isolate_digits(tokenizer, "2024 and 7")
    assert tokenizer.decode(isolated) == "2024 and 7"
    assert isolated[:4] == [tokenizer.encode(digit)[0] for digit in "2024"]
    assert FAMILIES_OF_RELEASES["gpt2-medium"].isolates_digits and not FAMILIES_OF_RELEASES["gpt2"].isolates_digits
