"""The network of RADD: a bidirectional transformer from partly masked tokens to log-probabilities of the clean ones.

It has no time input and no position table; rotary angles make any length work. Parameter names, their order and their
initial values are those of the published checkpoints. ``forward`` does everything that needs parameters, head and loss
included, so that wrappers which gather or reduce parameters (DDP, FSDP2, ZeRO) see every use.

Dimensions: B batch, L sequence, D width, H heads, K head width, N real tokens, V = N + 1 columns (the last is the
mask), P positions selected by ``where`` in row-major order.
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.chunked_loss import chunked_nll, chunked_weighted_nll
from common.config import require_at_least, require_choice
from common.errors import ConfigError

DTYPES = (None, "float32", "bfloat16", "float16")
ROTARY_BASE = 10000
LONGEST_PLAIN_ATTENTION = 512  # above, the score matrix is worth avoiding


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Proportions of the network; names are those of the reference's ``model`` group."""

    name: str = "radd"
    type: str = "ddit_wot"  # the reference's only architecture; not used
    hidden_size: int  # width of the residual stream
    cond_dim: int = 128  # not used (a remainder of SEDD); kept so that released files round-trip
    length: int = 1024  # tokens per training sequence; the network itself takes any length
    n_blocks: int
    n_heads: int
    dropout: float = 0.02  # of both branch outputs of every block
    use_checkpoint: bool = False  # recompute each block in backward: less memory, about 1/3 more compute
    dtype: str | None = None  # autocast dtype that overrides the run's precision; None: the run decides

    def __post_init__(self) -> None:
        for name in ("hidden_size", "length", "n_blocks", "n_heads"):
            require_at_least(f"model.{name}", getattr(self, name), 1)
        if self.hidden_size % self.n_heads:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} is not a multiple of model.n_heads={self.n_heads}; every head "
                "needs the same width."
            )
        if self.hidden_size // self.n_heads % 2:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} / model.n_heads={self.n_heads} gives heads of odd width "
                f"{self.hidden_size // self.n_heads}; rotary embedding turns pairs, so choose an even width."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout={self.dropout} must lie in [0, 1).")
        require_choice("model.dtype", self.dtype, DTYPES)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The config in a released ``config.json``'s ``model`` entry: unknown keys are ignored, optional ones default.

        Raises: ConfigError that names a required key which is missing.
        """
        for name in ("hidden_size", "n_blocks", "n_heads"):
            if name not in values:
                raise ConfigError(f"model.{name} is missing from the model's configuration; add it to config.json.")
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is in float64 (a model cast by ``.double()`` stays exact)."""
    return x if x.dtype == torch.float64 else x.float()


class LayerNorm(nn.Module):
    """Normalisation in float32 whatever the precision; scale AND shift start at one, as in the released code (sic)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(at_least_float32(x), self.weight.shape, self.weight, self.bias, eps=1e-5)


class Embedding(nn.Module):
    """Token vectors, uniform in +-1/sqrt(D); under this name because the published key is ``vocab_embed.embedding``."""

    def __init__(self, columns: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(columns, width))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, z_BL: Tensor) -> Tensor:
        return F.embedding(z_BL, self.embedding)


class Rotary(nn.Module):
    """Tables of the rotary angles for a length: cosine and sine, ``(L, K)``, the half-width table written twice.

    Tables are kept per (length, device, dtype), so moving or casting the model never leaves a stale one.
    """

    def __init__(self, head_width: int) -> None:
        super().__init__()
        inv_freq = 1.0 / (ROTARY_BASE ** (torch.arange(0, head_width, 2, dtype=torch.float32) / head_width))
        self.register_buffer("inv_freq", inv_freq, persistent=True)
        self._tables: dict[tuple, tuple[Tensor, Tensor]] = {}

    def forward(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():  # a dict that grows would be traced as a guard
            return rotary_tables(length, self.inv_freq, dtype)
        key = (length, self.inv_freq.device, dtype)
        if key not in self._tables:
            # Made outside inference mode: a table first needed by evaluation is later saved for a backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self._tables[key] = rotary_tables(length, self.inv_freq.detach().clone(), dtype)
        return self._tables[key]

    def _apply(self, *args: Any, **kwargs: Any) -> "Rotary":
        self._tables.clear()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        self._tables.clear()
        # The buffer can be computed, so weight files that leave it out are complete.
        state_dict.setdefault(prefix + "inv_freq", self.inv_freq)
        super()._load_from_state_dict(state_dict, prefix, *args)


def rotary_tables(length: int, inv_freq: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos_LK and sin_LK of ``position * inv_freq``, computed in float32 and cast to the dtype of queries and keys."""
    position_L = torch.arange(length, device=inv_freq.device, dtype=torch.float32)
    angle_LK = torch.outer(position_L, inv_freq.float()).repeat(1, 2)
    return angle_LK.cos().to(dtype), angle_LK.sin().to(dtype)


def apply_rotary(x_BLHK: Tensor, cos_LK: Tensor, sin_LK: Tensor) -> Tensor:
    """Queries or keys turned by their position: ``x cos + rotate_half(x) sin``, halves (not neighbours) paired."""
    half = x_BLHK.shape[-1] // 2
    first, second = x_BLHK[..., :half], x_BLHK[..., half:]
    cos, sin = cos_LK[:, None, :half], sin_LK[:, None, :half]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over all positions, ``(B, H, L, K)``."""
    length, width = q_BHLK.shape[-2:]
    if q_BHLK.device.type == "cpu" and q_BHLK.dtype == torch.bfloat16 and length <= LONGEST_PLAIN_ATTENTION:
        # torch's fused CPU kernel gains nothing from bfloat16: 22 ms against 10 ms forward and backward at B 8, L 256.
        score_BHLL = (q_BHLK * width**-0.5) @ k_BHLK.transpose(-1, -2)
        return score_BHLL.softmax(dim=-1) @ v_BHLK
    return F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK)


class Block(nn.Module):
    """One pre-norm transformer layer; attention sees all positions.

    With ``rows_P`` (flat indices into B*L) everything after attention, three quarters of the layer's products, is done
    at those positions only and the result is ``(P, D)``: what the last layer needs when only P positions are read.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm1 = LayerNorm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x_BLD: Tensor, cos_LK: Tensor, sin_LK: Tensor, rows_P: Tensor | None = None) -> Tensor:
        batch, length, width = x_BLD.shape
        qkv = self.attn_qkv(self.norm1(x_BLD)).view(batch, length, 3 * self.heads, width // self.heads)
        qk, v = qkv.split([2 * self.heads, self.heads], dim=2)  # queries and keys are turned together
        q, k = apply_rotary(qk, cos_LK.to(qkv.dtype), sin_LK.to(qkv.dtype)).chunk(2, dim=2)
        mixed = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        x = x_BLD
        if rows_P is not None:
            mixed = mixed.flatten(0, 1).index_select(0, rows_P)
            x = x.flatten(0, 1).index_select(0, rows_P)
        # Float32 residual stream: autocast branches return half precision and are promoted by the sum.
        x = x + F.dropout(self.attn_out(mixed), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


class Head(nn.Linear):
    """Logits over V columns, or the cross-entropy over the N real ones in chunks; starts at zero, so at ln N."""

    def __init__(self, width: int, columns: int) -> None:
        super().__init__(width, columns)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(
        self, hidden: Tensor, target_P: Tensor | None = None, weight_P: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if target_P is None:
            return super().forward(hidden)
        classes = self.out_features - 1
        if weight_P is None:
            return chunked_nll(hidden, self.weight, self.bias, target_P, classes=classes)
        return chunked_weighted_nll(hidden, self.weight, self.bias, target_P, weight_P, classes=classes)


class OutputLayer(nn.Module):
    """Final normalisation and head."""

    def __init__(self, width: int, columns: int) -> None:
        super().__init__()
        self.norm_final = LayerNorm(width)
        self.linear = Head(width, columns)

    def forward(self, x: Tensor, target_P: Tensor | None = None, weight_P: Tensor | None = None):
        return self.linear(self.norm_final(x), target_P, weight_P)


class RADD(nn.Module):
    """Log-probabilities of clean tokens given partly masked ones.

    Attributes:
        mask_id: id of the mask token, equal to ``tokens``; the last of V = tokens + 1 columns.
        blocks: the transformer layers, which sharding and activation checkpointing treat one by one.

    Source: the network of arXiv 2406.03736 (SEDD's without time conditioning); specification section 4.1.
    """

    def __init__(self, config: ModelConfig, tokens: int) -> None:
        super().__init__()
        require_at_least("tokens", tokens, 1)
        self.config = config
        self.tokens = tokens
        self.mask_id = tokens
        self.vocab_embed = Embedding(tokens + 1, config.hidden_size)
        self.rotary_emb = Rotary(config.hidden_size // config.n_heads)
        self.blocks = nn.ModuleList(
            Block(config.hidden_size, config.n_heads, config.dropout) for _ in range(config.n_blocks)
        )
        self.output_layer = OutputLayer(config.hidden_size, tokens + 1)

    def forward(
        self,
        z_BL: Tensor,
        targets_BL: Tensor | None = None,
        where: Tensor | None = None,
        weights_B: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Four outputs, by what is asked for; all are float32 and in nats.

        * ``forward(z)``: ``(B, L, V)``, columns 0..N-1 the log-softmax over the N real tokens, column N the raw logit
          of the mask (the reference's output; nothing should read that column).
        * ``forward(z, where=...)``: ``(P, V)`` log-probabilities at the positions, the mask column -inf.
        * ``forward(z, targets, where)``: ``(P,)`` NLL of the targets at the positions. With no position it is empty,
          and its sum is a zero that depends on every parameter.
        * ``forward(z, targets, where, weights_B)``: ``(sum, nll_P)`` with ``sum`` the NLLs times their row's constant
          weight. Same gradients with a quarter less head compute; ``nll_P`` carries no gradient.

        Args:
            z_BL: int64 ids in 0..N, N the mask.
            targets_BL: int64 clean ids in 0..N-1 (others are allowed where ``where`` is false).
            where: bool ``(B, L)``.
            weights_B: float32 constants, one per row.

        Raises: ValueError for targets without positions.
        """
        if targets_BL is not None and where is None:
            raise ValueError("RADD.forward: targets need `where`, the positions at which their loss is taken.")
        with self._precision(z_BL.device):
            if where is None:
                logits_BLV = at_least_float32(self.output_layer(self._trunk(z_BL)))
                log_probs_BLN = logits_BLV[..., : self.tokens].log_softmax(dim=-1)
                return torch.cat([log_probs_BLN, logits_BLV[..., self.tokens :]], dim=-1)
            rows_P = where.flatten().nonzero().squeeze(1)
            hidden_PD = self._trunk(z_BL, rows_P)
            if targets_BL is None:
                logits_PV = at_least_float32(self.output_layer(hidden_PD))
                logits_PV[:, self.tokens] = -torch.inf
                return logits_PV.log_softmax(dim=-1)
            target_P = targets_BL.flatten().index_select(0, rows_P)
            if weights_B is None:
                return self.output_layer(hidden_PD, target_P)
            weight_P = weights_B.index_select(0, rows_P // z_BL.shape[1])
            return self.output_layer(hidden_PD, target_P, weight_P)

    def logits(self, z_BL: Tensor) -> Tensor:
        """Raw logits of all V columns, ``(B, L, V)``, in the dtype of the matrix products."""
        with self._precision(z_BL.device):
            return self.output_layer(self._trunk(z_BL))

    def _trunk(self, z_BL: Tensor, rows_P: Tensor | None = None) -> Tensor:
        """Residual stream after the last block: ``(B, L, D)``, or ``(P, D)`` at flat positions ``rows_P``."""
        x = self.vocab_embed(z_BL)
        cos_LK, sin_LK = self.rotary_emb(z_BL.shape[1], self._table_dtype(x))
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            rows = rows_P if index == last else None
            if self.config.use_checkpoint and self.training:
                x = checkpoint(block, x, cos_LK, sin_LK, rows, use_reentrant=False)
            else:
                x = block(x, cos_LK, sin_LK, rows)
        return x

    def _table_dtype(self, x: Tensor) -> torch.dtype:
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

    def _precision(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The autocast that ``config.dtype`` asks for; none if it is None, or float16 on a CPU (as the reference)."""
        dtype = self.config.dtype
        if dtype is None or device.type == "meta" or (dtype == "float16" and device.type == "cpu"):
            return contextlib.nullcontext()
        if dtype == "float32":
            return torch.autocast(device.type, enabled=False)
        return torch.autocast(device.type, dtype=getattr(torch, dtype))


def count_parameters(config: ModelConfig, tokens: int) -> int:
    """Trainable parameters, by formula: 2VD + V + n_blocks (12 D^2 + 9 D) + 2 D."""
    width, columns = config.hidden_size, tokens + 1
    return 2 * columns * width + columns + config.n_blocks * (12 * width**2 + 9 * width) + 2 * width
