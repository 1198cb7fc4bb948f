"""The size of each parameter as part of its node's feature.

Dimensions: B graphs, N nodes, d width of the encoder.
"""

import bisect
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

LLM_CHANNELS = (32000, 50257, 128256)  # vocabularies of Llama 2, GPT-2 and Llama 3
SMALL_CHANNELS = range(4, 8)  # snap to 8, the smallest of the regular list
MIN_SPATIAL = 12

Shape = tuple[int, ...]


def channel_list(num_classes: int, variant: str) -> list[int]:
    """Counts of channels that have an embedding of their own, ascending.

    Source: GHN-3; LoGAH adds the vocabularies for language models (golden cases ``shape_encoder*``).
    """
    known = {1, 3, num_classes} | set(range(8, 57, 8)) | set(range(64, 4081, 16)) | set(range(4096, 8193, 32))
    return sorted(known | set(LLM_CHANNELS if variant == "llm" else ()))


def spatial_list(max_spatial: int) -> list[int]:
    """Kernel sizes that have an embedding of their own, ascending."""
    return sorted(set(range(1, max(MIN_SPATIAL, max_spatial), 2)) | {14, 16})


def nearest(value: int, known: Sequence[int]) -> int:
    """Position of ``value`` in the ascending list, else of the nearest entry (the smaller on ties)."""
    at = bisect.bisect_left(known, value)
    if at == len(known):
        return at - 1
    if known[at] == value or at == 0:
        return at
    return at - 1 if value - known[at - 1] <= known[at] - value else at


def four_sizes(shape: Shape) -> tuple[int, int, int, int]:
    """Outputs, inputs, height and width of a parameter of 1 to 4 dimensions."""
    if len(shape) == 3:
        first, tokens, width = shape
        if first == 1 and tokens > 1 and width > 1:  # a table of positions
            side = int(tokens**0.5)
            return 1, width, side, side
    return tuple(shape) + (1,) * (4 - len(shape))


class ShapeEncoder(nn.Module):
    """Adds an embedding of the four sizes of each node to its feature; nodes without a shape get rows of their own.

    Args:
        hid: d.
        num_classes: of the data that the hypernetwork is trained on: a size that must be told from its neighbours.
    """

    def __init__(self, hid: int, num_classes: int, max_spatial: int, variant: str = "vision") -> None:
        super().__init__()
        self.channels = channel_list(num_classes, variant)
        self.spatials = spatial_list(max_spatial)
        self.embed_spatial = nn.Embedding(len(self.spatials) + 1, hid // 4)
        self.embed_channel = nn.Embedding(len(self.channels) + 1, hid // 4)

    @cached_property
    def _looked_up(self) -> dict[Shape, tuple[int, int, int, int]]:
        return {}

    def _indices(self, shape: Shape | None) -> tuple[int, int, int, int]:
        if shape is None:
            return (len(self.channels),) * 2 + (len(self.spatials),) * 2
        if shape not in self._looked_up:
            outputs, inputs, height, width = four_sizes(shape)
            self._looked_up[shape] = (
                self._channel(outputs),
                self._channel(inputs),
                self._spatial(height),
                self._spatial(width),
            )
        return self._looked_up[shape]

    def _channel(self, count: int) -> int:
        exact = nearest(count, self.channels)
        if self.channels[exact] == count or count not in SMALL_CHANNELS:
            return exact
        return self.channels.index(8)

    def _spatial(self, size: int) -> int:
        return nearest(3 if size == 2 else size, self.spatials)

    def forward(self, x_BNd: Tensor, shapes: Sequence[Sequence[Shape | None]]) -> Tensor:
        """``x_BNd`` plus ``[E_c(outputs), E_c(inputs), E_s(height), E_s(width)]`` of each node.

        Args:
            shapes: of the nodes of each graph; padding may be left out.
        """
        size = x_BNd.shape[1]
        none = self._indices(None)
        rows = [[self._indices(shape) for shape in graph] + [none] * (size - len(graph)) for graph in shapes]
        index_BN4 = torch.tensor(rows, device=x_BNd.device)
        parts = [self.embed_channel(index_BN4[..., 0]), self.embed_channel(index_BN4[..., 1])]
        parts += [self.embed_spatial(index_BN4[..., 2]), self.embed_spatial(index_BN4[..., 3])]
        return x_BNd + torch.cat(parts, dim=-1)
