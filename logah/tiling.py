"""Decoded tensors cut or repeated to the size of their target.

Dimensions: o outputs, i inputs, T positions, C width, s side of the grid of positions.

Source: GHN-3 and LoGAH tile what they decode over wider layers (golden case ``tile``).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

Shape = tuple[int, ...]


def grid_side(positions: int) -> tuple[int, int]:
    """Side s of the square grid behind a table of so many positions, and rows in front of it (a class token).

    One or two rows more than a square are class and distillation tokens. Other counts belong to grids that are not
    square; the table is then cut from the next larger square.
    """
    side = math.isqrt(positions)
    front = positions - side**2
    return (side, front) if front <= 2 else (side + 1, 0)


def position_table(grid_1Css: Tensor, positions: int, front_rows: Tensor | None = None) -> Tensor:
    """``(1, T, C)`` from a decoded ``(1, C, s, s)``, after ``front_rows`` (zero without them).

    Args:
        front_rows: (T - s^2, C).
    """
    table = grid_1Css.flatten(2).transpose(1, 2)
    front = positions - table.shape[1]
    if front <= 0:
        return table[:, :positions]
    rows = table.new_zeros(front, table.shape[2]) if front_rows is None else front_rows.to(table)
    return torch.cat([rows[None], table], dim=1)


def tile(w: Tensor, shape: Shape) -> Tensor:
    """``w`` in exactly ``shape``: cropped (kernels round their centre), then repeated along each dimension.

    ``w`` of four dimensions fits a target of two (the pixel at the centre is taken) and a table of positions
    ``(1, T, C)``; ``w`` of two dimensions fits one of four with a 1 x 1 kernel.

    Raises: ValueError if dimensions do not fit.
    """
    if w.dim() == 4 and len(shape) == 3:
        return position_table(tile(w, (1, shape[2], *w.shape[2:])), shape[1])
    if w.dim() == 4 and len(shape) == 2:
        w = w[..., w.shape[2] // 2, w.shape[3] // 2]
    elif w.dim() == 2 and len(shape) == 4:
        w = w[..., None, None]
    if w.dim() != len(shape):
        raise ValueError(f"a decoded tensor of shape {tuple(w.shape)} does not fit a parameter of shape {shape}")
    if w.dim() == 4:
        w = resize_kernel(w, shape[2:])
    return repeat_to(w, shape)


def repeat_to(w: Tensor, shape: Shape) -> Tensor:
    """``w`` cropped and repeated along each dimension to ``shape``, whatever the dimensions mean."""
    w = w[tuple(slice(0, size) for size in shape)]
    repeats = [math.ceil(size / have) for size, have in zip(shape, w.shape, strict=True)]
    if max(repeats) > 1:
        w = w.repeat(repeats)[tuple(slice(0, size) for size in shape)]
    return w


def resize_kernel(w: Tensor, size: Shape) -> Tensor:
    """A kernel cropped round its centre where it is larger than ``size``, and resized where it is smaller."""
    height, width = size
    top, left = (max(0, have // 2 - wanted // 2) for have, wanted in zip(w.shape[2:], size, strict=True))
    w = w[:, :, top : top + height, left : left + width]
    if w.shape[2] < height or w.shape[3] < width:
        w = F.interpolate(w, size=(height, width), mode="bilinear")
    return w
