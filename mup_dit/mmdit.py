"""MMDiT by muP: image and text tokens in two streams that attend jointly; rectified flow; optional REPA head.

The paper's largest network was never released. This is our own, with the keys of diffusers' SD3 transformer.

Dimensions: B batch, N image tokens, T text tokens, D width, H heads, E head size, F features of the REPA encoder.

Source: arXiv 2505.15270, section 5 (sizes); specification 3.6.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import ConfigError
from mup_dit.fused import gated_sum, modulated_norm
from mup_dit.layers import (
    FREQUENCIES,
    NORM_EPS,
    HeadNorm,
    attend,
    guided_pair,
    merge_heads,
    position_table,
    split_heads,
    timestep_embedding,
    unpatchify,
    xavier_std,
)
from mup_dit.parametrization import Init, InitLaw, Readout
from mup_dit.shape import NetworkShape

TIME_SCALE = 1000.0  # t in [0, 1] enters the sinusoid as 0..1000


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig(NetworkShape):
    """Shape of an MMDiT; depth 19 and head size 64 give 0.18B at width 512 and 18B at 5120."""

    depth: int = 19
    hidden_size: int = 512
    num_heads: int = 8
    patch_size: int = 2
    input_size: int = 32
    in_channels: int = 4
    caption_channels: int = 4096  # of the text tokens
    pooled_channels: int = 2048  # of the pooled text vector
    model_max_length: int = 120
    class_dropout_prob: float = 0.1  # share of captions that become zeros while training
    mlp_ratio: float = 4.0
    qk_norm: bool = True
    drop_last_text: bool = True  # the last block does not update the text stream, as in SD3
    zero_gates: bool = False  # modulation starts at zero (adaLN-Zero); always so under the standard parametrisation
    output_mult: float = 1.0
    attention_scale: Literal["sqrt", "mup"] = "sqrt"
    base_head_size: int | None = None
    repa_depth: int | None = None  # block whose image tokens predict the encoder's features; null: no REPA
    repa_channels: int = 768  # F

    def __post_init__(self) -> None:
        self.check_shape("caption_channels", "pooled_channels", "model_max_length", "repa_channels")
        if self.repa_depth is not None and not 1 <= self.repa_depth <= self.depth:
            raise ConfigError(f"model.repa_depth={self.repa_depth} must lie in 1..{self.depth} (blocks), or be null.")

    @property
    def learn_sigma(self) -> bool:
        """A flow has no variance."""
        return False


class PositionedPatches(nn.Module):
    """Image -> tokens plus a fixed position table."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.register_buffer("pos_embed", torch.empty(1, config.grid**2, size))
        self.proj = nn.Conv2d(config.in_channels, size, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, x_BCSS: Tensor) -> Tensor:
        x_BND = self.proj(x_BCSS.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)
        return x_BND + self.pos_embed.to(x_BND.dtype)


class TwoLayers(nn.Module):
    """Linear, SiLU, linear."""

    def __init__(self, in_features: int, size: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(in_features, size), nn.Linear(size, size)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x_BD.to(self.linear_1.weight.dtype))))


class TimeTextEmbedding(nn.Module):
    """The condition of all modulations: time plus pooled text."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayers(FREQUENCIES, config.hidden_size)
        self.text_embedder = TwoLayers(config.pooled_channels, config.hidden_size)

    def forward(self, t_B: Tensor, pooled_BP: Tensor) -> Tensor:
        return self.timestep_embedder(timestep_embedding(TIME_SCALE * t_B, FREQUENCIES)) + self.text_embedder(pooled_BP)


class Modulation(nn.Module):
    """``SiLU(c)`` through a linear map, split into ``parts`` of width D."""

    def __init__(self, size: int, parts: int) -> None:
        super().__init__()
        self.parts, self.linear = parts, nn.Linear(size, parts * size)

    def forward(self, c_BD: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(c_BD))[:, None].chunk(self.parts, dim=-1)


class JointAttention(nn.Module):
    """Both streams have maps of their own; queries of each see the keys of both."""

    def __init__(self, config: MMDiTConfig, text_out: bool) -> None:
        super().__init__()
        size, self.heads, self.scale = config.hidden_size, config.num_heads, config.scale
        self.to_q, self.to_k, self.to_v = (nn.Linear(size, size) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(size, size) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(size, size)])
        self.to_add_out = nn.Linear(size, size) if text_out else None
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            norm = HeadNorm(config.head_size, eps=NORM_EPS) if config.qk_norm else nn.Identity()
            self.add_module(name, norm)

    def forward(self, x_BND: Tensor, y_BTD: Tensor, mask_B11K: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Args: mask_B11K: bool, the keys that count, image tokens first; None: all."""
        q = torch.cat([self.norm_q(self._split(self.to_q(x_BND))),
                       self.norm_added_q(self._split(self.add_q_proj(y_BTD)))], dim=2)  # fmt: skip
        k = torch.cat([self.norm_k(self._split(self.to_k(x_BND))),
                       self.norm_added_k(self._split(self.add_k_proj(y_BTD)))], dim=2)  # fmt: skip
        v = torch.cat([self._split(self.to_v(x_BND)), self._split(self.add_v_proj(y_BTD))], dim=2)
        h = merge_heads(attend(q, k, v, mask=mask_B11K, scale=self.scale))
        image, text = h[:, : x_BND.shape[1]], h[:, x_BND.shape[1] :]
        return self.to_out[0](image), None if self.to_add_out is None else self.to_add_out(text)

    def _split(self, x: Tensor) -> Tensor:
        return split_heads(x, self.heads)


class GELULinear(nn.Module):
    """Linear, then GELU (tanh form); a module of its own for the key ``net.0.proj``."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(size, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, size: int, ratio: float) -> None:
        super().__init__()
        hidden = int(size * ratio)
        self.net = nn.ModuleDict({"0": GELULinear(size, hidden), "2": nn.Linear(hidden, size)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net["2"](self.net["0"](x))


class JointBlock(nn.Module):
    """One block of both streams; the last one may leave the text stream as it is."""

    def __init__(self, config: MMDiTConfig, text_out: bool) -> None:
        super().__init__()
        size = config.hidden_size
        self.text_out = text_out
        self.norm1 = Modulation(size, 6)
        self.norm1_context = Modulation(size, 6 if text_out else 2)
        self.attn = JointAttention(config, text_out)
        self.ff = FeedForward(size, config.mlp_ratio)
        self.ff_context = FeedForward(size, config.mlp_ratio) if text_out else None

    def forward(self, x_BND: Tensor, y_BTD: Tensor, c_BD: Tensor, mask_B11K: Tensor | None) -> tuple[Tensor, Tensor]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.norm1(c_BD)
        if self.text_out:
            y_shift1, y_scale1, y_gate1, y_shift2, y_scale2, y_gate2 = self.norm1_context(c_BD)
        else:
            y_scale1, y_shift1 = self.norm1_context(c_BD)  # this order in SD3
        image, text = self.attn(
            modulated_norm(x_BND, shift1, scale1, NORM_EPS),
            modulated_norm(y_BTD, y_shift1, y_scale1, NORM_EPS),
            mask_B11K,
        )
        x_BND = gated_sum(x_BND, gate1, image)
        x_BND = gated_sum(x_BND, gate2, self.ff(modulated_norm(x_BND, shift2, scale2, NORM_EPS)))
        if self.text_out:
            y_BTD = gated_sum(y_BTD, y_gate1, text)
            y_BTD = gated_sum(y_BTD, y_gate2, self.ff_context(modulated_norm(y_BTD, y_shift2, y_scale2, NORM_EPS)))
        return x_BND, y_BTD


class RepaHead(nn.Module):
    """Image tokens -> features of a frozen encoder, ``(B, N, F)``."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.fc1 = nn.Linear(size, size)
        self.fc2 = nn.Linear(size, size)
        self.readout = Readout(size, config.repa_channels)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.readout(F.silu(self.fc2(F.silu(self.fc1(x_BND)))))


class MMDiT(nn.Module):
    """``(B, C, S, S)``, times in [0, 1], text tokens and pooled text -> velocity ``(B, C, S, S)``."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.scalings = None
        self.pos_embed = PositionedPatches(config)
        self.time_text_embed = TimeTextEmbedding(config)
        self.context_embedder = nn.Linear(config.caption_channels, size)
        last = config.depth - 1
        self.transformer_blocks = nn.ModuleList(
            JointBlock(config, text_out=index < last or not config.drop_last_text) for index in range(config.depth)
        )
        self.norm_out = Modulation(size, 2)
        self.proj_out = Readout(size, config.patch_size**2 * config.out_channels, config.output_mult)
        self.repa = None if config.repa_depth is None else RepaHead(config)
        self.reset_tables()

    @property
    def blocks(self) -> nn.ModuleList:
        """What sharding and activation checkpointing treat one by one."""
        return self.transformer_blocks

    @torch.no_grad()
    def reset_tables(self, generator: torch.Generator | None = None) -> None:
        """Computes what is not drawn: the position table."""
        config, table = self.config, self.pos_embed.pos_embed
        table.copy_(position_table(config.hidden_size, (config.grid, config.grid), device=table.device)[None])

    def forward(
        self,
        x_BCSS: Tensor,
        t_B: Tensor,
        text_BTC: Tensor,
        pooled_BP: Tensor,
        mask_BT: Tensor | None = None,
        drop_B: Tensor | None = None,
        *,
        features: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Args:
            mask_BT: true where a text token counts; None: all.
            drop_B: where true tokens and pooled text become zeros, the null caption.
            features: also return the REPA head's ``(B, N, F)``.

        Raises: ValueError for images or captions of another size.
        """
        config = self.config
        self._check(x_BCSS, text_BTC, pooled_BP, features)
        if drop_B is not None:
            keep_B = ~drop_B.bool()
            text_BTC, pooled_BP = text_BTC * keep_B[:, None, None], pooled_BP * keep_B[:, None]
        x_BND = self.pos_embed(x_BCSS)
        c_BD = self.time_text_embed(t_B, pooled_BP)
        y_BTD = self.context_embedder(text_BTC.to(self.context_embedder.weight.dtype))
        mask = None
        if mask_BT is not None:
            image_BN = mask_BT.new_ones(x_BND.shape[:2], dtype=torch.bool)
            mask = torch.cat([image_BN, mask_BT.bool()], dim=1)[:, None, None]
        found = None
        for index, block in enumerate(self.transformer_blocks, start=1):
            x_BND, y_BTD = block(x_BND, y_BTD, c_BD, mask)
            if features and index == config.repa_depth:
                found = self.repa(x_BND)
        scale, shift = self.norm_out(c_BD)
        out = unpatchify(self.proj_out(modulated_norm(x_BND, shift, scale, NORM_EPS)), config.patch_size,
                         config.out_channels)  # fmt: skip
        return (out, found) if features else out

    def _check(self, x_BCSS: Tensor, text_BTC: Tensor, pooled_BP: Tensor, features: bool) -> None:
        config = self.config
        if tuple(x_BCSS.shape[1:]) != (config.in_channels, config.input_size, config.input_size):
            raise ValueError(
                f"input of shape {tuple(x_BCSS.shape[1:])}; the model takes "
                f"{(config.in_channels, config.input_size, config.input_size)} (channels, rows, columns)."
            )
        for name, tensor, channels in (
            ("text tokens", text_BTC, config.caption_channels),
            ("pooled text", pooled_BP, config.pooled_channels),
        ):
            if tensor.shape[-1] != channels:
                raise ValueError(f"{name} have {tensor.shape[-1]} channels, the model takes {channels}.")
        if features and self.repa is None:
            raise ValueError("features need a REPA head; set model.repa_depth.")

    def forward_with_cfg(
        self, x_BCSS: Tensor, t_B: Tensor, text_BTC: Tensor, pooled_BP: Tensor, cfg_scale: float,
        mask_BT: Tensor | None = None, channels: Literal["three", "all"] = "all",
    ) -> Tensor:  # fmt: skip
        """Guided velocity of 2n rows in one call: the first n latents twice, with n captions and then n null ones."""
        half = x_BCSS[: len(x_BCSS) // 2]
        out = self(torch.cat([half, half]), t_B, text_BTC, pooled_BP, mask_BT)
        return guided_pair(out, cfg_scale, 3 if channels == "three" else self.config.in_channels)

    def init_law(self, parametrization: str) -> InitLaw:
        """How every parameter begins."""
        zero_gates = self.config.zero_gates or parametrization == "sp"

        def law(name: str, shape: tuple[int, ...], base: tuple[int | None, ...], width_mult: float) -> Init:
            if ".norm_" in name and name.endswith("weight") and len(shape) == 1:
                return Init("ones")
            modulation = name.endswith("linear.weight") and ("norm1" in name or name.startswith("norm_out"))
            if len(shape) == 1 or name == "proj_out.weight" or (zero_gates and modulation):
                return Init("zeros")
            fan_in = math.prod(shape[1:])
            if name == "repa.readout.weight" and parametrization != "sp":  # output type: constant in width
                return Init("normal", 1.0 / math.sqrt(base[1] or fan_in))
            if parametrization == "sp":
                return Init("uniform", xavier_std(shape))
            return Init("normal", 1.0 / math.sqrt(fan_in))

        return law
