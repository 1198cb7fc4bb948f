"""A LLaMA of a few kilobytes, trained for seconds on embedded text: a language model to adapt without a download.

Dimensions: N rows, L tokens.
"""

from pathlib import Path

import torch
from torch.nn import functional as F

from common.data.corpora import build_text_dataset
from common.data.tokenizer import load_tokenizer
from common.folders import write_folder
from common.seeding import derive_seed, generator

VOCABULARY = 257  # every byte and an end: more than the text uses, so that other texts fit too
WIDTH, LAYERS, HEADS, LENGTH = 64, 2, 4, 64
STEPS, BATCH_SIZE, LR = 200, 16, 3e-3


def write_tiny_llama(folder: Path, *, width: int = WIDTH, layers: int = LAYERS, steps: int = STEPS) -> Path:
    """Writes a folder of the transformers library (config.json, model.safetensors), the same every time.

    Tokens are bytes (``tokenizer=byte``). 200 steps take about ten seconds on one core.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer("byte")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
    )
    # transformers draws initial weights from the global generator; its state comes back afterwards
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(0, "tiny llama"))
        model = LlamaForCausalLM(config)
    if steps:
        text = build_text_dataset(
            "embedded:topics", "train", length=LENGTH, tokenizer=tokenizer, cache_dir=None, progress=False
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
        for step in range(steps):
            drawn = torch.randint(len(text), (BATCH_SIZE,), generator=generator(0, "tiny llama rows", step))
            tokens_NL = torch.stack([torch.as_tensor(text[int(row)]["tokens"]) for row in drawn])
            logits_NLV = model(input_ids=tokens_NL, use_cache=False).logits[:, :-1]
            optimizer.zero_grad()
            F.cross_entropy(logits_NLV.flatten(0, 1), tokens_NL[:, 1:].flatten()).backward()
            optimizer.step()
    return write_folder(Path(folder), lambda to: model.save_pretrained(str(to)))
