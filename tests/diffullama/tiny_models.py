"""Tiny models with deterministic weights, for the tests of scoring and evaluation."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from common.testing.golden import fill
from diffullama.model import DiffusionLM

VOCAB = 40
MASK = 39


def tiny_lm(
    family: str = "gpt2",
    *,
    vocab: int = VOCAB,
    mask_id: int | None = None,
    shift: bool = True,
    positions: int = 64,
    implementation: str = "sdpa",
    seed: int = 3,
) -> DiffusionLM:
    """Two layers of width 16, in eval mode."""
    shared = {"vocab_size": vocab, "bos_token_id": None, "eos_token_id": None, "attn_implementation": implementation}
    if family == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        hf = GPT2LMHeadModel(GPT2Config(n_positions=positions, n_embd=16, n_layer=2, n_head=2, **shared, **dropout))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(num_key_value_heads=2, max_position_embeddings=positions, **sizes, **shared)
        hf = LlamaForCausalLM(config)
    fill(hf, seed)
    return DiffusionLM(hf, vocab - 1 if mask_id is None else mask_id, shift).eval()


def rows(count: int, length: int, *, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    """Random ids without the mask."""
    return torch.randint(0, vocab - 1, (count, length), generator=torch.Generator().manual_seed(seed))
