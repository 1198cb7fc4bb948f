"""Small networks of every kind that the tests predict, and their graphs."""

import torch
from torch import nn

from logah.architectures import Architecture, gpt2, llama, vit
from logah.net_graph import NetGraph
from logah.tracing import trace
from tests.logah.golden_graphs import SmallConvNet

VITS = [
    vit(4, num_layers=2, num_heads=2, hidden_dim=16, image_size=16),
    vit(4, num_layers=1, num_heads=2, hidden_dim=24, image_size=16),
    vit(8, num_layers=3, num_heads=2, hidden_dim=12, image_size=16),
]
GPT2 = gpt2(16, 2, 2, vocab_size=90, n_positions=24)
TIED_GPT2 = gpt2(16, 2, 2, vocab_size=90, n_positions=24, tie_word_embeddings=True)
LLAMA = llama(16, 2, 2, vocab_size=90, intermediate_size=40, num_key_value_heads=1)


def network_of(architecture: Architecture) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return architecture.build().eval()


def convolutional(c: int = 8, k: int = 10) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallConvNet(c, k).eval()


def graph_of(model: nn.Module, variant: str = "vision", image_size: int | None = None) -> NetGraph:
    """As the tiny hypernetworks expect it."""
    return trace(model, variant=variant, attention="explicit", ve_cutoff=50, image_size=image_size)
