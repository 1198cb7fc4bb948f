"""LoGAH's decoder: every tensor is a product of two factors of rank r, read from one list of numbers.

A node's embedding gives H, 2r rows of r numbers; one linear map takes each row to K values. The 2r K values, read in
order, are 2K rows of r numbers: the first K are A, the others B transposed. A target with n rows uses the first n rows
of A alone, which come from the first ceil(n r / K) rows of H, so a tensor is decoded from the few rows that it needs.

Dimensions: R nodes, d width of the encoder, r rank, K rows of a factor, n rows that are read.

Source: LoGAH, section 3 (golden case ``decoder_lora``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from logah.sliced_linear import sliced_linear

Request = tuple[int, int, int, int]
"""Outputs, inputs, kernel height and width."""

A, B = 0, 1


@dataclass(frozen=True)
class Read:
    """Rows ``start`` .. ``stop - 1`` of a factor: ``A``, or ``B`` transposed."""

    factor: int
    start: int
    stop: int

    def span(self, rank: int, max_ck: int) -> tuple[int, int]:
        """First and last row of the factor's half of H that they come from."""
        return self.start * rank // max_ck, (self.stop * rank - 1) // max_ck


class Trunk(nn.Module):
    """d -> 4d -> 8d -> 2 r^2, under the published names ``fc.0``, ``fc.2``, ``fc.4``."""

    def __init__(self, hid: int, rank: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(hid, 4 * hid), nn.ReLU(), nn.Linear(4 * hid, 8 * hid), nn.ReLU(), nn.Linear(8 * hid, 2 * rank**2)
        )


class LowRankDecoder(nn.Module):
    """Factors of a tensor from the embedding of its node.

    ``l1`` is never used; it and the second name of ``l2``, ``seq.1``, stand in the published state dicts.

    Args:
        max_ck: K.
    """

    def __init__(self, hid: int, rank: int, max_ck: int) -> None:
        super().__init__()
        self.rank, self.max_ck = rank, max_ck
        self.mlp = Trunk(hid, rank)
        self.l1 = nn.Linear(rank, rank)
        self.l2 = nn.Linear(rank, max_ck)
        self.seq = nn.Sequential(nn.ReLU(), self.l2)

    # ---------------------------------------------------------------- the needed part

    def trunk(self, x_Rd: Tensor) -> Tensor:
        """``(R, 8d)``: what all tensors of all nodes share; one pass serves every request."""
        return self.mlp.fc[:4](x_Rd)

    def read(self, trunk_Rt: Tensor, wanted: Read) -> Tensor:
        """Rows of a factor for R nodes: ``(R, n, r)``."""
        return self.read_many([trunk_Rt], [wanted])[0]

    def read_many(self, trunks: Sequence[Tensor], wanted: Sequence[Read]) -> list[Tensor]:
        """Rows of factors, ``(R, n, r)`` each, for several groups of nodes at once.

        Args:
            trunks: ``(R, 8d)`` of the nodes of each group.
        """
        K, rank, last_map = self.max_ck, self.rank, self.mlp.fc[4]
        spans = [read.span(rank, K) for read in wanted]
        h_rows = [
            slice((read.factor * rank + first) * rank, (read.factor * rank + last + 1) * rank)
            for read, (first, last) in zip(wanted, spans, strict=True)
        ]
        pieces = _Pieces()
        for h, read, (first, last) in zip(
            sliced_linear(trunks, last_map.weight, last_map.bias, h_rows), wanted, spans, strict=True
        ):
            h_Rjr = F.relu(h).view(len(h), last - first + 1, rank)
            pieces.add(h_Rjr, read.start * rank - first * K, read.stop * rank - first * K, K)
        flat = pieces.values(self.l2.weight, self.l2.bias)
        return [
            values.view(len(values), read.stop - read.start, rank) for values, read in zip(flat, wanted, strict=True)
        ]

    # ---------------------------------------------------------------- as released

    def full(self, x_Rd: Tensor, request: Request, kind: str = "4d") -> Tensor:
        """A requested tensor per node by way of both whole factors, as released; the slow twin of the rest.

        Args:
            kind: ``4d`` -> ``(R, o, i, kh, kw)``; ``class`` -> ``(R, o, i)``; ``1d`` -> ``(R, o)``.
        """
        outputs, inputs, height, width = request
        h = self.mlp.fc(x_Rd).view(-1, 2 * self.rank, self.rank)
        both = self.seq(h).reshape(len(x_Rd), 2 * self.max_ck, self.rank)
        a, b = both[:, : self.max_ck][:, : outputs * height], both[:, self.max_ck :][:, : inputs * width]
        product = a @ b.transpose(1, 2)
        if kind == "class":
            return product
        if kind == "1d":
            return product.flatten(1)
        return as_kernel(product, request)

    def forward(self, x_Rd: Tensor, request: Request, kind: str = "4d") -> Tensor:
        """The same numbers as ``full``, from the rows that the request reads; beyond K there are none."""
        outputs, inputs, height, width = request
        trunk = self.trunk(x_Rd)
        a = self.read(trunk, Read(A, 0, min(outputs * height, self.max_ck)))
        b = self.read(trunk, Read(B, 0, min(inputs * width, self.max_ck)))
        product = a @ b.transpose(1, 2)
        if kind == "class":
            return product
        if kind == "1d":
            return product.flatten(1)
        return as_kernel(product, request)


class _Pieces:
    """Parts of rows of ``l2``'s output: those with the same columns, of whatever node, are one product.

    A large map is then read once for both factors of a square matrix, and once for all whole rows.
    """

    def __init__(self) -> None:
        self._inputs: dict[tuple[int, int], list[Tensor]] = {}
        self._places: list[list[tuple[tuple[int, int], int]]] = []

    def add(self, h_Rjr: Tensor, begin: int, end: int, width: int) -> None:
        """Values ``begin`` .. ``end - 1`` of the j rows of ``width`` outputs, read one after the other."""
        last = (end - 1) // width
        tail = end - last * width
        if last == 0:
            parts = [(h_Rjr, begin, tail)]
        else:
            whole_from, whole_to = (1 if begin else 0), (last if tail < width else last + 1)
            parts = [(h_Rjr[:, :1], begin, width)] if begin else []
            if whole_to > whole_from:
                parts.append((h_Rjr[:, whole_from:whole_to], 0, width))
            if tail < width:
                parts.append((h_Rjr[:, -1:], 0, tail))
        places = []
        for x_Rjr, start, stop in parts:
            inputs = self._inputs.setdefault((start, stop), [])
            places.append(((start, stop), len(inputs)))
            inputs.append(x_Rjr)
        self._places.append(places)

    def values(self, weight: Tensor, bias: Tensor) -> list[Tensor]:
        """``(R, end - begin)`` of everything added, in that order."""
        keys = list(self._inputs)
        joined = [torch.cat([x.flatten(0, 1) for x in self._inputs[key]]) for key in keys]
        products = sliced_linear(joined, weight, bias, [slice(*key) for key in keys])
        outputs = {}
        for key, product in zip(keys, products, strict=True):
            sizes = [x.shape[0] * x.shape[1] for x in self._inputs[key]]
            parts = zip(product.split(sizes), self._inputs[key], strict=True)
            outputs[key] = [part.reshape(x.shape[0], -1) for part, x in parts]
        found = []
        for places in self._places:
            row = [outputs[key][number] for key, number in places]
            found.append(row[0] if len(row) == 1 else torch.cat(row, dim=1))
        return found


def as_kernel(product: Tensor, request: Request) -> Tensor:
    """``(R, o kh, i kw)`` as ``(R, o, i, kh, kw)``."""
    outputs, inputs, height, width = request
    return product.view(len(product), outputs, height, inputs, width).permute(0, 1, 3, 2, 4)
