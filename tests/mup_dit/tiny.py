"""Tiny networks of every family, and inputs for them."""

import torch

from mup_dit.building import ModelConfig, Network, build_model
from mup_dit.dit import DiTConfig
from mup_dit.mmdit import MMDiTConfig
from mup_dit.pixart import PixArtConfig

HEAD = 8  # size; base width 4 heads = 32

NETWORKS = {
    "dit": lambda heads, **more: DiTConfig(
        **{"depth": 2, "hidden_size": heads * HEAD, "num_heads": heads, "input_size": 8, "num_classes": 10, **more}
    ),
    "pixart": lambda heads, **more: PixArtConfig(
        **{"depth": 2, "hidden_size": heads * HEAD, "num_heads": heads, "input_size": 8, "caption_channels": 20,
           "model_max_length": 6, **more}
    ),
    "mmdit": lambda heads, **more: MMDiTConfig(
        **{"depth": 2, "hidden_size": heads * HEAD, "num_heads": heads, "input_size": 8, "caption_channels": 20,
           "pooled_channels": 12, "model_max_length": 6, **more}
    ),
}  # fmt: skip


def model_config(family: str = "dit", heads: int = 4, parametrization: str = "mup", **more) -> ModelConfig:
    return ModelConfig(family=family, parametrization=parametrization, network=NETWORKS[family](heads, **more))


def model(family: str = "dit", heads: int = 4, parametrization: str = "mup", seed: int = 0, **more) -> Network:
    """With random readouts, whose zero init would hide everything behind them."""
    generator = torch.Generator().manual_seed(seed)
    built = build_model(model_config(family, heads, parametrization, **more), generator)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(0.0, 0.05, generator=generator)
    return built


def inputs(family: str = "dit", rows: int = 2, seed: int = 0, channels: int = 4, side: int = 8) -> tuple:
    """What the network of this family is called with."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, side, side, generator=rng)
    if family == "dit":
        return x, torch.randint(1000, (rows,), generator=rng), torch.randint(10, (rows,), generator=rng)
    if family == "pixart":
        return x, torch.randint(1000, (rows,), generator=rng), torch.randn(rows, 1, 6, 20, generator=rng)
    text = torch.randn(rows, 6, 20, generator=rng)
    return x, torch.rand(rows, generator=rng), text, torch.randn(rows, 12, generator=rng)
