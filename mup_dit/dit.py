"""DiT: a class-conditional diffusion transformer with adaptive layer norm, by muP or in its original form.

Dimensions: B batch, N tokens, D width, C channels, S side of the latent, K classes.

Source: specification 3.1, 3.2; state-dict keys are those of the released checkpoints.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mup_dit.fused import gated_sum, modulated_norm
from mup_dit.layers import (
    NORM_EPS,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    SelfAttention,
    TimestepEmbedder,
    guided_pair,
    position_table,
    unpatchify,
    xavier_std,
)
from mup_dit.parametrization import Init, InitLaw, Readout
from mup_dit.shape import NetworkShape

HEAD_SIZE = 72  # of all published DiT and PixArt-alpha widths except DiT-S and DiT-B, which have 64
GUIDED_CHANNELS = 3  # of the reference's guidance: it leaves the fourth latent channel unguided


@dataclass(frozen=True, kw_only=True)
class DiTConfig(NetworkShape):
    """Shape of a DiT. Names as in the reference; ``hidden_size`` is D, ``input_size`` is S."""

    depth: int = 28
    hidden_size: int = 1152
    num_heads: int = 16
    patch_size: int = 2
    input_size: int = 32  # side of the latent
    in_channels: int = 4
    num_classes: int = 1000
    class_dropout_prob: float = 0.1  # share of labels that become the null class while training; 0: no null class
    mlp_ratio: float = 4.0
    learn_sigma: bool = True  # as many channels again for the variance
    output_mult: float = 1.0  # of the readout, by muP or not
    qk_norm: bool = False
    attention_scale: Literal["sqrt", "mup"] = "sqrt"  # mup: for widths that grow by head size
    base_head_size: int | None = None  # of attention_scale=mup; None: this model's own

    def __post_init__(self) -> None:
        self.check_shape("num_classes")


class DiTBlock(nn.Module):
    """Attention and MLP behind layer norms whose shift, scale and gate come from the condition."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.attn = SelfAttention(size, config.num_heads, config.scale, config.qk_norm)
        self.mlp = Mlp(size, int(size * config.mlp_ratio), size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 6 * size))

    def forward(self, x_BND: Tensor, c_BD: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c_BD)[:, None].chunk(6, dim=-1)
        x_BND = gated_sum(x_BND, gate1, self.attn(modulated_norm(x_BND, shift1, scale1, NORM_EPS)))
        return gated_sum(x_BND, gate2, self.mlp(modulated_norm(x_BND, shift2, scale2, NORM_EPS)))


class FinalLayer(nn.Module):
    """Modulated layer norm and the readout to ``p p C_out`` values per token."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.linear = Readout(size, config.patch_size**2 * config.out_channels, config.output_mult)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 2 * size))

    def forward(self, x_BND: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_BD)[:, None].chunk(2, dim=-1)
        return self.linear(modulated_norm(x_BND, shift, scale, NORM_EPS))


class DiT(nn.Module):
    """``(B, C, S, S)``, times and labels -> ``(B, C_out, S, S)``.

    Built without a table it is an ordinary network with torch's default init; ``mup_dit.building.build_model`` gives it
    a parametrisation. ``scalings`` is then its table, name -> ``Scaling``.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.scalings = None
        self.x_embedder = PatchEmbed(config.in_channels, size, config.patch_size)
        self.t_embedder = TimestepEmbedder(size)
        self.y_embedder = LabelEmbedder(config.num_classes, size, config.class_dropout_prob)
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid**2, size), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.reset_tables()

    @torch.no_grad()
    def reset_tables(self, generator: torch.Generator | None = None) -> None:
        """Computes what is not drawn: the position table."""
        config, device = self.config, self.pos_embed.device
        self.pos_embed.copy_(position_table(config.hidden_size, (config.grid, config.grid), device=device)[None])

    def forward(self, x_BCSS: Tensor, t_B: Tensor, y_B: Tensor, drop_B: Tensor | None = None) -> Tensor:
        """Args: t_B: original step indices, may be fractional; drop_B: where true the label is dropped.

        Raises: ValueError for images of another size or labels outside the table.
        """
        config = self.config
        if tuple(x_BCSS.shape[1:]) != (config.in_channels, config.input_size, config.input_size):
            raise ValueError(
                f"input of shape {tuple(x_BCSS.shape[1:])}; the model takes "
                f"{(config.in_channels, config.input_size, config.input_size)} (channels, rows, columns)."
            )
        x_BND = self.x_embedder(x_BCSS.to(self.x_embedder.proj.weight.dtype)) + self.pos_embed
        c_BD = self.t_embedder(t_B) + self.y_embedder(y_B, drop_B)
        for block in self.blocks:
            x_BND = block(x_BND, c_BD)
        return unpatchify(self.final_layer(x_BND, c_BD), config.patch_size, config.out_channels)

    def forward_with_cfg(
        self, x_BCSS: Tensor, t_B: Tensor, y_B: Tensor, cfg_scale: float, channels: Literal["three", "all"] = "three"
    ) -> Tensor:
        """Guided output of 2n rows in one call: the first n latents are used twice, with labels and with null labels.

        Args:
            y_B: n labels, then n null labels.
            channels: that are guided: the first three, as in the reference, or all of the prediction.
        """
        half = x_BCSS[: len(x_BCSS) // 2]
        out = self(torch.cat([half, half]), t_B, y_B)
        count = min(GUIDED_CHANNELS, self.config.in_channels) if channels == "three" else self.config.in_channels
        return guided_pair(out, cfg_scale, count)

    @staticmethod
    def init_law(parametrization: str) -> InitLaw:
        """How every parameter begins (specification 3.2, last table)."""
        return _init_mup if parametrization != "sp" else _init_sp


def _init_mup(name: str, shape: tuple[int, ...], base: tuple[int | None, ...], width_mult: float) -> Init:
    """Normal with variance 1/fan_in; unit labels; zero readout and biases. Gates are random: no adaLN-Zero."""
    if name == "pos_embed":
        return Init("fixed")
    if _is_gain(name):
        return Init("ones")
    if len(shape) == 1 or name == "final_layer.linear.weight":
        return Init("zeros")
    if name == "y_embedder.embedding_table.weight":
        return Init("normal", 1.0)
    return Init("normal", 1.0 / math.sqrt(math.prod(shape[1:])))


def _init_sp(name: str, shape: tuple[int, ...], base: tuple[int | None, ...], width_mult: float) -> Init:
    if name == "pos_embed":
        return Init("fixed")
    if _is_gain(name):
        return Init("ones")
    if len(shape) == 1 or "adaLN_modulation" in name or name == "final_layer.linear.weight":
        return Init("zeros")
    if name.startswith(("t_embedder", "y_embedder")):
        return Init("normal", 0.02)
    return Init("uniform", xavier_std(shape))


def _is_gain(name: str) -> bool:
    return name.endswith(("q_norm.weight", "k_norm.weight"))
