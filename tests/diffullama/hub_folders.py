"""Tiny models and tokenizers in the hub's folder format, one of each family, for the tests of loading and export."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from common.data.tokenizer import HuggingFaceTokenizer, train_bpe
from common.testing.golden import fill
from diffullama.saving import quiet_transformers

VOCAB = 280
SHARED = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
DROPOUTS = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, **DROPOUTS}),
    "llama": (LlamaForCausalLM, LlamaConfig, SIZES),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {**SIZES, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**SIZES, "head_dim": 8, "tie_word_embeddings": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {**SIZES, "sliding_window": 3}),
}


def tiny_hf(family: str = "gpt2", *, seed: int = 3, implementation: str = "sdpa", **options) -> nn.Module:
    """A random ``*ForCausalLM`` with deterministic weights, in eval mode."""
    model_class, config_class, sizes = FAMILIES[family]
    config = config_class(**{**SHARED, **sizes, **options}, attn_implementation=implementation)
    with quiet_transformers():
        return fill(model_class(config), seed).eval()


@cache
def _trained_tokenizer() -> str:
    corpus = ["the cat sat on the mat and the dog sat on the log"] * 4 + ["one two three four five"] * 4
    return train_bpe(corpus, VOCAB).tokenizer.backend_tokenizer.to_str()


def tiny_tokenizer() -> HuggingFaceTokenizer:
    """A byte-level tokenizer of at most ``VOCAB`` tokens, end-of-text 0, without a mask."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer.from_str(_trained_tokenizer())
    return HuggingFaceTokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>"))


def write_hub_folder(folder: Path, hf: nn.Module, *, tokenizer: bool = True) -> Path:
    """As on the hub: ``save_pretrained`` of model and tokenizer."""
    with quiet_transformers():
        hf.save_pretrained(str(folder))
    if tokenizer:
        tiny_tokenizer().save(folder)
    return folder


def write_shards(folder: Path, state: dict[str, Tensor], *, suffix: str = "safetensors") -> Path:
    """The weights of a folder as three shards with their index, in place of its single file."""
    single, stem = ("model.safetensors", "model") if suffix == "safetensors" else ("pytorch_model.bin", "pytorch_model")
    (folder / "model.safetensors").unlink(missing_ok=True)
    weight_map = {}
    for part in range(3):
        name = f"{stem}-{part + 1:05d}-of-00003.{suffix}"
        tensors = {key: state[key].clone() for key in list(state)[part::3]}
        if suffix == "safetensors":
            save_file(tensors, folder / name, metadata={"format": "pt"})
        else:
            torch.save(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{single}.index.json").write_text(json.dumps(index))
    return folder


def edit_json(path: Path, **values) -> None:
    """Sets (or with None removes) entries of a JSON file."""
    content = json.loads(path.read_text())
    content = {key: value for key, value in {**content, **values}.items() if value is not None}
    path.write_text(json.dumps(content))


def assert_same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Equal names and equal bits."""
    assert sorted(left) == sorted(right)
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name
