"""Untrained generators of tiny networks, for tests of saving, loading and generation."""

from typing import Any

import torch
from torch import Tensor, nn

from rpg.codec import TokenCodec
from rpg.model import Generator, build_generator
from rpg.model_config import GeneratorConfig
from rpg.saving import GeneratorFacts
from rpg.structure import compute_structure

DIM = 32
OPTIONS = {
    "dim_per_token": DIM, "d_model": DIM, "d_state": 8, "headdim": 16, "channels": (1, 4, 8, 4, 1), "kernel_size": 3,
    "diffusion_steps": 50, "chunk_size": 8,
}  # fmt: skip


class TinyNet(nn.Module):
    """Convolution, batch normalisation and a linear layer that shares its weight: all kinds of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(40, 16)
        self.tied = nn.Linear(40, 16)
        self.tied.weight = self.head.weight
        self.register_buffer("index", torch.arange(5))
        self.scale = nn.Parameter(torch.tensor(0.5))


def networks(count: int = 4) -> list[dict[str, Tensor]]:
    """State dicts that differ a little."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = TinyNet()
        states = []
        for _ in range(count):
            for value in network.parameters():
                value.data.add_(0.05 * torch.randn_like(value) * (value.numel() > 1))  # one value alone is constant
            network.norm.running_var.uniform_(0.5, 2)
            states.append(clone_state(network))
    return states


def clone_state(network: nn.Module) -> dict[str, Tensor]:
    """A copy that keeps ties."""
    copies: dict[int, Tensor] = {}
    return {
        name: copies.setdefault(value.data_ptr(), value.detach().clone())
        for name, value in network.state_dict().items()
    }


def tiny_codec(normalisation: str = "layer") -> TokenCodec:
    return TokenCodec(compute_structure(networks(), normalisation), DIM)


def tiny_generator(codec: TokenCodec | None = None, **options: Any) -> tuple[Generator, TokenCodec]:
    """A generator with random weights, also where they start constant."""
    codec = codec or tiny_codec()
    config = GeneratorConfig(**{**OPTIONS, "num_tokens": codec.num_tokens, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = build_generator(config, codec, codec.tensor_names)
        for value in model.parameters():
            if value.dim() > 1:
                value.data.add_(0.1 * torch.randn_like(value))
    return model.eval().requires_grad_(False), codec


def tiny_facts(**values: Any) -> GeneratorFacts:
    return GeneratorFacts(**{"tag": "tiny", "num_checkpoints": 4, **values})
