"""Matrices known by their factors: their statistics without forming them, and their rows a few at a time.

A decoded matrix is A B, cut to the target's size, or repeated where the target is larger. A hypernetwork that fills a
model and one that streams to disk both end here, with the same blocks in the same order, so they agree bit for bit.

Dimensions: P rows and Q columns after which the matrix repeats, R rank.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.errors import ConfigError

BLOCK_VALUES = 1 << 22
"""Values of a block: 16 MiB in float32. Fixed, because the bits of a product can depend on the shape of its factors."""


@dataclass(frozen=True)
class FactoredMatrix:
    """The matrix M[i, j] = sum_r A[i mod P, r] B[r, j mod Q].

    Attributes:
        a_PR, b_RQ: the factors; P and Q are at least 1, and at most ``rows`` and ``columns``.
        rows, columns: size of M.

    Source: LoGAH (arXiv 2405.16287), whose decoder makes A and B; tiling the factors tiles the product.
    """

    a_PR: Tensor
    b_RQ: Tensor
    rows: int
    columns: int

    def __post_init__(self) -> None:
        period, other = self.a_PR.shape[0], self.b_RQ.shape[1]
        if self.a_PR.shape[1] != self.b_RQ.shape[0] or not (0 < period <= self.rows and 0 < other <= self.columns):
            raise ConfigError(
                f"factors of shapes {tuple(self.a_PR.shape)} and {tuple(self.b_RQ.shape)} do not make a matrix of "
                f"{self.rows} x {self.columns}; they need one rank, and no more rows and columns than the matrix."
            )

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rows, self.columns)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance (n - 1 in the denominator) of all entries of M, float64 scalars, in O((P + Q) R^2).

        The sum is (1^T A)(B 1) and the sum of squares trace((A^T A)(B B^T)), with every row of A and column of B
        counted as often as M repeats it.
        """
        a_PR, b_RQ = self.a_PR.double(), self.b_RQ.double()
        rows_P = _repeats(self.rows, a_PR.shape[0], a_PR.device)
        columns_Q = _repeats(self.columns, b_RQ.shape[1], b_RQ.device)
        weighted_PR, weighted_RQ = a_PR * rows_P[:, None], b_RQ * columns_Q
        total = weighted_PR.sum(0) @ weighted_RQ.sum(1)
        squares = ((a_PR.T @ weighted_PR) * (weighted_RQ @ b_RQ.T)).sum()  # both are symmetric
        count = self.rows * self.columns
        mean = total / count
        variance = (squares - total * mean) / max(count - 1, 1)
        return mean, variance.clamp_min(0)

    def std(self) -> Tensor:
        """Standard deviation of all entries (n - 1 in the denominator), a scalar of the factors' dtype."""
        return self.moments()[1].sqrt().to(self.a_PR.dtype)

    def scaled(self, factor: Tensor | float) -> "FactoredMatrix":
        """``factor`` times M; costs one pass over B."""
        return replace(self, b_RQ=self.b_RQ * factor)

    def blocks(self, dtype: torch.dtype | None = None) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """M in blocks of whole rows, each computed once however often it occurs.

        Args:
            dtype: of the blocks; None: of the factors.

        Yields:
            The first rows of M that a block stands at, and the block; the last place may have room for its first rows
            only.
        """
        period = self.a_PR.shape[0]
        step = rows_per_block(self.columns)
        whole, rest = divmod(self.columns, self.b_RQ.shape[1])
        for start in range(0, period, step):
            block = self.a_PR[start : start + step] @ self.b_RQ
            if dtype is not None:
                block = block.to(dtype)  # before it is repeated: half the bytes to copy
            if whole > 1 or rest:
                block = torch.cat([block] * whole + [block[:, :rest]] * (rest > 0), dim=1)
            yield tuple(range(start, self.rows, period)), block

    def materialise(self, out: Tensor | None = None) -> Tensor:
        """M itself.

        Args:
            out: a tensor of M's shape that takes it (cast to its dtype); None: a new one, through which gradients
                reach the factors.
        """
        if out is None and torch.is_grad_enabled() and (self.a_PR.requires_grad or self.b_RQ.requires_grad):
            period = torch.cat([block for _, block in self.blocks()])
            copies = math.ceil(self.rows / period.shape[0])
            return period.repeat(copies, 1)[: self.rows] if copies > 1 else period
        if out is None:
            out = self.a_PR.new_empty(self.shape)
        for starts, block in self.blocks(out.dtype):
            for start in starts:
                place = out[start : start + block.shape[0]]
                place.copy_(block[: place.shape[0]])
        return out


def rows_per_block(columns: int) -> int:
    """Rows of a block of a matrix with so many columns."""
    return max(1, BLOCK_VALUES // columns)


def _repeats(size: int, period: int, device: torch.device) -> Tensor:
    """How often each of ``period`` rows occurs among ``size``, float64."""
    whole, rest = divmod(size, period)
    counts = torch.full((period,), float(whole), dtype=torch.float64, device=device)
    counts[:rest] += 1
    return counts
