"""Sinusoidal position tables of tokens.

Dimensions: L tokens, W width of the table.
"""

from typing import Protocol

import torch
from torch import Tensor

from common.errors import ConfigError

KINDS = ("none", "1d", "2d")


class TokenPlaces(Protocol):
    """Where each token lies, as ``TokenCodec`` says it."""

    num_tokens: int
    token_tensor_L: Tensor
    token_index_L: Tensor


def position_table_1d(length: int, width: int) -> Tensor:
    """``(length, width)``: sine in even, cosine in odd channels, frequencies ``10000^(-2j / width)``.

    Raises: ConfigError for an odd width.
    """
    return _waves(torch.arange(length, dtype=torch.float32), width)


def position_table_2d(rows: int, columns: int, width: int) -> Tensor:
    """``(rows, columns, width)``: the first half of the channels is the 1-D table of the column, the second of the row.

    Raises: ConfigError unless the width is a multiple of 4.
    """
    _check_width(width, 4)
    column = position_table_1d(columns, width // 2)[None].expand(rows, -1, -1)
    row = position_table_1d(rows, width // 2)[:, None].expand(-1, columns, -1)
    return torch.cat([column, row], dim=-1)


def token_positions(codec: TokenPlaces, kind: str, width: int) -> Tensor:
    """``(L, W)``: positions of the tokens of one network.

    Args:
        kind: ``2d``: column = place inside the tensor, row = number of the tensor; ``1d``: place in the whole sequence;
            ``none``: zeros.

    Source: RPG (Wang et al., 2025), position embedding of layer and in-layer index.

    Raises: ConfigError for an unknown kind or a width that it cannot have.
    """
    if kind not in KINDS:
        raise ConfigError(f"model.positions={kind!r} is not known; choose one of {', '.join(KINDS)}.")
    if kind == "none":
        return torch.zeros(codec.num_tokens, width)
    if kind == "1d":
        return position_table_1d(codec.num_tokens, width)
    _check_width(width, 4)
    # half tables are looked up instead of the whole (tensors x longest tensor) one, which can be 100 times larger
    column_LW = _waves(codec.token_index_L.float(), width // 2)
    row_LW = _waves(codec.token_tensor_L.float(), width // 2)
    return torch.cat([column_LW, row_LW], dim=-1)


def _waves(position_L: Tensor, width: int) -> Tensor:
    _check_width(width, 2)
    frequency = torch.pow(10000.0, -torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = position_L.to(frequency.device)[:, None] * frequency  # a meta device when costs are planned
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def _check_width(width: int, divisor: int) -> None:
    if width % divisor:
        near = max(divisor, round(width / divisor) * divisor)
        raise ConfigError(
            f"model.d_model={width} is no width for this position table: it must be a multiple of {divisor}; "
            f"use {near}, or model.positions={'1d' if divisor == 4 else 'none'}."
        )
