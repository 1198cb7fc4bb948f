"""PixArt-alpha: a text-to-image diffusion transformer whose blocks share one modulation (adaLN-single).

Dimensions: B batch, N image tokens, T caption tokens, Y caption channels, D width, C channels, S side of the latent.

Source: specification 3.3, 3.4; state-dict keys are those of the released checkpoints.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from mup_dit.dit import GUIDED_CHANNELS
from mup_dit.fused import gated_sum, modulated_norm
from mup_dit.layers import (
    FREQUENCIES,
    NORM_EPS,
    CrossAttention,
    Mlp,
    PatchEmbed,
    SelfAttention,
    TimestepEmbedder,
    guided_pair,
    is_concrete,
    position_table,
    timestep_embedding,
    unpatchify,
    xavier_std,
)
from mup_dit.parametrization import Init, InitLaw, Readout
from mup_dit.shape import NetworkShape

SMALL_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class PixArtConfig(NetworkShape):
    """Shape of a PixArt-alpha. Names as in the reference; ``hidden_size`` is D, ``input_size`` is S."""

    depth: int = 28
    hidden_size: int = 1152
    num_heads: int = 16
    patch_size: int = 2
    input_size: int = 32
    in_channels: int = 4
    caption_channels: int = 4096  # of the text encoder; T5-v1.1-XXL
    model_max_length: int = 120  # caption tokens
    class_dropout_prob: float = 0.1  # share of captions that become the null caption while training
    mlp_ratio: float = 4.0
    learn_sigma: bool = True
    lewei_scale: float = 1.0  # divides the positions, for other resolutions
    drop_path: float = 0.0  # stochastic depth of the last block, growing linearly from 0
    micro_conditions: bool = False  # PixArt-MS: size and aspect ratio as conditions, any grid of tokens
    output_mult: float = 1.0
    qk_norm: bool = False
    attention_scale: Literal["sqrt", "mup"] = "sqrt"
    base_head_size: int | None = None

    def __post_init__(self) -> None:
        third = 3 if self.micro_conditions else 1
        self.check_shape("caption_channels", "model_max_length", divisor=third, divided_for="model.micro_conditions")
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"model.drop_path={self.drop_path} must lie in [0, 1).")


class CaptionEmbedder(nn.Module):
    """Caption features ``(B, 1, T, Y)`` -> ``(B, 1, T, D)``; dropped captions become the fixed null caption."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.register_buffer("y_embedding", torch.empty(config.model_max_length, config.caption_channels))
        self.y_proj = Mlp(config.caption_channels, config.hidden_size, config.hidden_size)

    def forward(self, y_B1TY: Tensor, drop_B: Tensor | None = None) -> Tensor:
        if drop_B is not None:
            null_TY = self.y_embedding.to(y_B1TY.dtype)
            y_B1TY = torch.where(drop_B.bool()[:, None, None, None], null_TY, y_B1TY)
        return self.y_proj(y_B1TY)


class SizeEmbedder(nn.Module):
    """``(B, k)`` numbers -> ``(B, k w)``: each through a sinusoid and an MLP of width w (PixArt-MS)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, values_BK: Tensor) -> Tensor:
        embedded = timestep_embedding(values_BK.flatten(), FREQUENCIES).to(self.mlp[0].weight.dtype)
        return self.mlp(embedded).reshape(len(values_BK), -1)


class PixArtBlock(nn.Module):
    """Modulated self-attention, plain cross-attention to the caption, modulated MLP."""

    def __init__(self, config: PixArtConfig, drop_path: float) -> None:
        super().__init__()
        size = config.hidden_size
        self.scale_shift_table = nn.Parameter(torch.empty(6, size))
        self.attn = SelfAttention(size, config.num_heads, config.scale, config.qk_norm)
        self.cross_attn = CrossAttention(size, config.num_heads, config.scale)
        self.mlp = Mlp(size, int(size * config.mlp_ratio), size)
        self.drop_path = drop_path

    def forward(self, x_BND: Tensor, y_BTD: Tensor, t0_B6D: Tensor, mask_B11T: Tensor | None) -> Tensor:
        """Args: t0_B6D: the shared modulation; the block adds its own table."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + t0_B6D).chunk(6, dim=1)
        x_BND = gated_sum(x_BND, gate1, self._dropped(self.attn(modulated_norm(x_BND, shift1, scale1, NORM_EPS))))
        x_BND = x_BND + self.cross_attn(x_BND, y_BTD, mask_B11T)
        return gated_sum(x_BND, gate2, self._dropped(self.mlp(modulated_norm(x_BND, shift2, scale2, NORM_EPS))))

    def _dropped(self, branch_BND: Tensor) -> Tensor:
        """Stochastic depth: the branch of whole rows is left out, the others are scaled up."""
        if not self.drop_path or not self.training:
            return branch_BND
        keep = 1 - self.drop_path
        return branch_BND * (torch.rand(len(branch_BND), 1, 1, device=branch_BND.device) < keep) / keep


class FinalLayer(nn.Module):
    """Norm modulated by a table plus the time embedding, and the readout."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.scale_shift_table = nn.Parameter(torch.empty(2, size))
        self.linear = Readout(size, config.patch_size**2 * config.out_channels, config.output_mult)

    def forward(self, x_BND: Tensor, e_BD: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + e_BD[:, None]).chunk(2, dim=1)
        return self.linear(modulated_norm(x_BND, shift, scale, NORM_EPS))


class PixArt(nn.Module):
    """``(B, C, S, S)``, times and caption features -> ``(B, C_out, S, S)``."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.scalings = None
        self.register_buffer("pos_embed", torch.empty(1, config.grid**2, size))
        self.x_embedder = PatchEmbed(config.in_channels, size, config.patch_size)
        self.t_embedder = TimestepEmbedder(size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(size, 6 * size))
        self.y_embedder = CaptionEmbedder(config)
        if config.micro_conditions:
            self.csize_embedder, self.ar_embedder = SizeEmbedder(size // 3), SizeEmbedder(size // 3)
        rates = [config.drop_path * index / max(config.depth - 1, 1) for index in range(config.depth)]
        self.blocks = nn.ModuleList(PixArtBlock(config, rate) for rate in rates)
        self.final_layer = FinalLayer(config)
        self.reset_tables()
        for module in self.modules():  # torch leaves bare parameters empty
            if hasattr(module, "scale_shift_table"):
                nn.init.normal_(module.scale_shift_table, std=SMALL_STD)

    @torch.no_grad()
    def reset_tables(self, generator: torch.Generator | None = None) -> None:
        """Computes the position table and draws the null caption, both of which are never trained."""
        config = self.config
        self.pos_embed.copy_(self._positions((config.grid, config.grid), self.pos_embed.device)[None])
        null_TY = self.y_embedder.y_embedding
        null_TY.normal_(0.0, 1.0 / math.sqrt(config.caption_channels), generator=generator)

    def _positions(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        config = self.config
        return position_table(config.hidden_size, grid, scale=config.lewei_scale, base_size=config.grid, device=device)

    def forward(
        self,
        x_BCSS: Tensor,
        t_B: Tensor,
        y_B1TY: Tensor,
        mask: Tensor | None = None,
        drop_B: Tensor | None = None,
        *,
        img_hw_B2: Tensor | None = None,
        aspect_ratio_B1: Tensor | None = None,
    ) -> Tensor:
        """Args:
            mask: ``(B, T)`` or ``(B, 1, 1, T)``, 1 where a caption token counts; the first ``mask.sum()`` tokens of a
                row do. A smaller batch is repeated, as under guidance. None: all tokens.
            drop_B: where true the caption is replaced by the null caption.
            img_hw_B2, aspect_ratio_B1: height and width in pixels, and their ratio, with ``micro_conditions``.

        Raises: ValueError for captions of another size, or a caption none of whose tokens counts.
        """
        config = self.config
        dtype = self.x_embedder.proj.weight.dtype
        self._check(x_BCSS, y_B1TY)
        grid = (x_BCSS.shape[2] // config.patch_size, x_BCSS.shape[3] // config.patch_size)
        positions = self.pos_embed if grid == (config.grid, config.grid) else self._positions(grid, x_BCSS.device)[None]
        x_BND = self.x_embedder(x_BCSS.to(dtype)) + positions.to(dtype)
        e_BD = self.t_embedder(t_B)
        if config.micro_conditions:
            if img_hw_B2 is None or aspect_ratio_B1 is None:
                raise ValueError("model.micro_conditions=true needs img_hw and aspect_ratio in every call.")
            e_BD = e_BD + torch.cat([self.csize_embedder(img_hw_B2), self.ar_embedder(aspect_ratio_B1)], dim=1)
        t0_B6D = self.t_block(e_BD).unflatten(1, (6, -1))
        y_BTD = self.y_embedder(y_B1TY.to(dtype), drop_B).squeeze(1)
        mask_B11T = None if mask is None else first_tokens(mask, *y_BTD.shape[:2])
        for block in self.blocks:
            x_BND = block(x_BND, y_BTD, t0_B6D, mask_B11T)
        return unpatchify(self.final_layer(x_BND, e_BD), config.patch_size, config.out_channels, grid)

    def _check(self, x_BCSS: Tensor, y_B1TY: Tensor) -> None:
        config = self.config
        rows, columns = x_BCSS.shape[2:]
        whole = rows % config.patch_size == 0 and columns % config.patch_size == 0
        if x_BCSS.shape[1] != config.in_channels or not whole:
            raise ValueError(
                f"input of shape {tuple(x_BCSS.shape[1:])}; the model takes {config.in_channels} channels and sides "
                f"divisible by patch_size={config.patch_size}."
            )
        if not config.micro_conditions and (rows, columns) != (config.input_size, config.input_size):
            raise ValueError(
                f"input of {rows} x {columns}; the model takes {config.input_size} x {config.input_size} "
                "(model.micro_conditions=true takes any grid)."
            )
        expected = (1, config.model_max_length, config.caption_channels)
        if y_B1TY.ndim != 4 or (self.training and tuple(y_B1TY.shape[1:]) != expected):
            raise ValueError(f"captions of shape {tuple(y_B1TY.shape)}; the model takes (B, *{expected}).")
        if y_B1TY.shape[3] != config.caption_channels:
            raise ValueError(f"captions have {y_B1TY.shape[3]} channels, the model takes {config.caption_channels}.")

    def forward_with_dpmsolver(
        self, x_BCSS: Tensor, t_B: Tensor, y_B1TY: Tensor, mask: Tensor | None = None, **conditions: Tensor
    ) -> Tensor:
        """The prediction of the noise alone, without the variance channels."""
        return self(x_BCSS, t_B, y_B1TY, mask, **conditions)[:, : self.config.in_channels]

    def forward_with_cfg(
        self,
        x_BCSS: Tensor,
        t_B: Tensor,
        y_B1TY: Tensor,
        cfg_scale: float,
        mask: Tensor | None = None,
        channels: Literal["three", "all"] = "three",
        **conditions: Tensor,
    ) -> Tensor:
        """Guided output of 2n rows in one call: the first n latents twice, with n captions and then n null captions."""
        half = x_BCSS[: len(x_BCSS) // 2]
        out = self(torch.cat([half, half]), t_B, y_B1TY, mask, **conditions)
        count = min(GUIDED_CHANNELS, self.config.in_channels) if channels == "three" else self.config.in_channels
        return guided_pair(out, cfg_scale, count)

    @staticmethod
    def init_law(parametrization: str) -> InitLaw:
        """How every parameter begins (specification 3.3)."""
        return _init_mup if parametrization != "sp" else _init_sp


def first_tokens(mask: Tensor, batch: int, length: int) -> Tensor:
    """bool ``(B, 1, 1, T)``: the first ``mask.sum()`` tokens of every row; rows are repeated to fill the batch.

    Raises: ValueError for masks of another length, or without a token (checked on the CPU only).
    """
    mask_BT = mask.reshape(-1, mask.shape[-1])
    if mask_BT.shape[1] != length or batch % len(mask_BT):
        raise ValueError(f"mask of shape {tuple(mask.shape)} does not fit {batch} captions of {length} tokens.")
    count_B = (mask_BT != 0).sum(dim=1)
    if is_concrete(mask) and not bool(count_B.all()):
        row = int((count_B == 0).nonzero()[0, 0])
        raise ValueError(f"caption {row} has a mask without any token; an empty caption keeps at least its end token.")
    count_B = count_B.repeat(batch // len(count_B))
    return (torch.arange(length, device=mask.device) < count_B[:, None])[:, None, None]


_INPUT_MAPS = ("t_embedder.mlp.0.", "y_embedder.y_proj.fc1.", "csize_embedder.mlp.0.", "ar_embedder.mlp.0.")
_SMALL_MAPS = (
    "t_embedder.mlp.2.",
    "t_block.1.",
    "y_embedder.y_proj.fc2.",
    "csize_embedder.mlp.2.",
    "ar_embedder.mlp.2.",
)


def _zero_or_one(name: str, shape: tuple[int, ...]) -> Init | None:
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return Init("ones")
    if len(shape) == 1 or name.endswith("cross_attn.proj.weight") or name == "final_layer.linear.weight":
        return Init("zeros")
    return None


def _init_sp(name: str, shape: tuple[int, ...], base: tuple[int | None, ...], width_mult: float) -> Init:
    if plain := _zero_or_one(name, shape):
        return plain
    if name.startswith((*_INPUT_MAPS, *_SMALL_MAPS)):
        return Init("normal", SMALL_STD)
    if name.endswith("scale_shift_table"):
        return Init("normal", 1.0 / math.sqrt(shape[1]))
    return Init("uniform", xavier_std(shape))


def _init_mup(name: str, shape: tuple[int, ...], base: tuple[int | None, ...], width_mult: float) -> Init:
    """As the reference's width-aware init: base-width laws, hidden ones divided by sqrt(m).

    The patch convolution takes fan-in and fan-out of its four-dimensional weight (specification 3.3); the tables are
    input-type vectors, whose size must not shrink with width.
    """
    if plain := _zero_or_one(name, shape):
        return plain
    if name.startswith(_INPUT_MAPS) or name.endswith("scale_shift_table"):
        return Init("normal", SMALL_STD)
    if name.startswith(_SMALL_MAPS):
        return Init("normal", SMALL_STD / math.sqrt(width_mult))
    at_base = tuple(known or size for known, size in zip(base, shape, strict=True))
    if len(shape) == 4:
        return Init("uniform", math.sqrt(2.0 / (at_base[0] + at_base[1]) / math.prod(shape[2:])))
    return Init("uniform", math.sqrt(2.0 / (at_base[0] + at_base[1])) / math.sqrt(width_mult))
