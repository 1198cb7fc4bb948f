"""A random LLaMA of a few kilobytes with bytes as tokens, as a local folder of the transformers library."""

from pathlib import Path

from rpg.zoo import tiny_llama


def write_tiny_llama(folder: Path, *, width: int = 32, layers: int = 2) -> Path:
    """Writes config.json and model.safetensors; the weights are the same every time."""
    return tiny_llama.write_tiny_llama(folder, width=width, layers=layers, steps=0)
