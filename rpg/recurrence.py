"""The stacks that turn position embedding plus condition into one prototype per token; they never see weights.

Keys are those of the released checkpoints. Dimensions: B batch, L tokens, M model width, P width of a prototype.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.mamba2 import Mamba2Mixer

MASKED_SCORE = 1e-8  # of the released transformer, which therefore sees the future a little


class Stack(nn.Module):
    """Base: holds the position embedding and adds the condition to it.

    Args:
        positions_LM: the table, a buffer ``pe (1, L, M)``, or a parameter of that name if ``trainable``.
    """

    width: int  # P

    def __init__(self, positions_LM: Tensor, *, trainable: bool = False) -> None:
        super().__init__()
        table_1LM = positions_LM.detach().clone().float()[None]
        if trainable:
            self.pe = nn.Parameter(table_1LM)
        else:
            self.register_buffer("pe", table_1LM)

    def forward(self, condition_BLM: Tensor) -> Tensor:
        """Prototypes ``(B, L, P)`` of a condition ``(B, 1 or L, M)``."""
        return self.relate(self.pe + condition_BLM)

    def relate(self, x_BLM: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers that are sharded and recomputed one by one."""
        raise NotImplementedError


class MambaStack(Stack):
    """Mamba-2 blocks one after another, without residual connections or norms between them.

    Args:
        post_d_model: width of the last block, whose input projection then reads ``d_model``; None: one width.
        options: of ``Mamba2Mixer``.
    """

    def __init__(
        self,
        positions_LM: Tensor,
        num_layers: int,
        *,
        post_d_model: int | None = None,
        trainable: bool = False,
        **options: int,
    ) -> None:
        super().__init__(positions_LM, trainable=trainable)
        width = positions_LM.shape[1]
        widths = [width] * (num_layers - 1) + [post_d_model or width]
        self.mamba_forward = nn.ModuleList(Mamba2Mixer(one, d_input=width, **options) for one in widths)
        self.width = widths[-1]

    def relate(self, x_BLM: Tensor) -> Tensor:
        for block in self.mamba_forward:
            x_BLM = block(x_BLM)
        return x_BLM

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.mamba_forward)


class LSTMStack(Stack):
    """``num_layers`` LSTM layers of one width."""

    def __init__(self, positions_LM: Tensor, num_layers: int, *, dropout: float = 0.0, trainable: bool = False) -> None:
        super().__init__(positions_LM, trainable=trainable)
        self.width = positions_LM.shape[1]
        self.lstm_forward = nn.LSTM(self.width, self.width, num_layers, batch_first=True, dropout=dropout)

    def relate(self, x_BLM: Tensor) -> Tensor:
        return self.lstm_forward(x_BLM)[0]

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.lstm_forward]


class Attention(nn.Module):
    """Causal self-attention after a norm.

    Args:
        released: scores without scaling, and masked ones replaced by 1e-8 instead of -inf, so that masked tokens keep
            the weight exp(0), as in the released code; False: scaled dot-product attention.
    """

    def __init__(self, width: int, num_heads: int, head_size: int, length: int, *, released: bool) -> None:
        super().__init__()
        inner = num_heads * head_size
        self.num_heads, self.released = num_heads, released
        self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * inner, bias=False)
        self.to_out = nn.Identity() if inner == width else nn.Linear(inner, width, bias=False)
        if released:
            self.register_buffer("mask", torch.ones(length, length, dtype=torch.bool).tril()[None, None])

    def forward(self, x_BLM: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.to_qkv(self.norm(x_BLM)).chunk(3, dim=-1)
        )
        if self.released:
            scores = (query @ key.transpose(-1, -2)).masked_fill(~self.mask, MASKED_SCORE)
            mixed = scores.softmax(-1) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.to_out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Norm, linear, GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x_BLM: Tensor) -> Tensor:
        return self.net(x_BLM)


class TransformerLayer(nn.ModuleList):
    """Attention, then feed-forward, both added to their input."""

    def forward(self, x_BLM: Tensor) -> Tensor:
        for part in self:
            x_BLM = x_BLM + part(x_BLM)
        return x_BLM


class TransformerStack(Stack):
    """Pre-norm transformer with a causal mask."""

    def __init__(
        self,
        positions_LM: Tensor,
        num_layers: int,
        *,
        num_heads: int,
        head_size: int,
        feedforward: int,
        attention: Literal["corrected", "released"] = "corrected",
        trainable: bool = False,
    ) -> None:
        super().__init__(positions_LM, trainable=trainable)
        length, self.width = positions_LM.shape
        self.transformer_forward = nn.Module()
        self.transformer_forward.layers = nn.ModuleList(
            TransformerLayer(
                [
                    Attention(self.width, num_heads, head_size, length, released=attention == "released"),
                    FeedForward(self.width, feedforward),
                ]
            )
            for _ in range(num_layers)
        )

    def relate(self, x_BLM: Tensor) -> Tensor:
        for layer in self.blocks:
            x_BLM = layer(x_BLM)
        return x_BLM

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.transformer_forward.layers)


class GatedMLPBlock(nn.Module):
    """``LN(proj_3(proj_1 x * sigmoid(proj_2 x)))``, one token at a time."""

    def __init__(self, width: int, expand: int) -> None:
        super().__init__()
        self.proj_1 = nn.Linear(width, expand * width, bias=False)
        self.proj_2 = nn.Linear(width, expand * width, bias=False)
        self.proj_3 = nn.Linear(expand * width, width)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, x_BLM: Tensor) -> Tensor:
        return self.layer_norm(self.proj_3(self.proj_1(x_BLM) * torch.sigmoid(self.proj_2(x_BLM))))


class GatedMLPStack(Stack):
    """The ablation without relations between tokens."""

    def __init__(self, positions_LM: Tensor, num_layers: int, *, expand: int = 2, trainable: bool = False) -> None:
        super().__init__(positions_LM, trainable=trainable)
        self.width = positions_LM.shape[1]
        self.gmlp_forward = nn.ModuleList(GatedMLPBlock(self.width, expand) for _ in range(num_layers))

    def relate(self, x_BLM: Tensor) -> Tensor:
        for block in self.gmlp_forward:
            x_BLM = block(x_BLM)
        return x_BLM

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.gmlp_forward)
