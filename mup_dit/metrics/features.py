"""What metrics see of images: features, spatial features and class scores of a frozen network.

Dimensions: B images, C channels, H, W rows and columns of pixels, D features, E spatial features, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Images = Sequence[NDArray[np.uint8]]
"""``(H, W, C)`` each, of any sizes; C is 3, or 1 for grey."""


@dataclass(frozen=True)
class Features:
    """float32, on the CPU."""

    pool_BD: Tensor
    spatial_BE: Tensor
    logits_BK: Tensor


class FeatureNetwork(Protocol):
    """A frozen network with the names that its metrics go by."""

    name: str  # for the record of results
    names: dict[str, str]  # metric's option -> name of the result

    def __call__(self, images: Images) -> Features: ...


INCEPTION_NAMES = {
    "fid": "fid", "sfid": "sfid", "is": "inception_score", "clean_fid": "clean_fid",
    "precision": "precision", "recall": "recall",
}  # fmt: skip


def by_size(
    images: Images, compute: Callable[[Tensor], tuple[Tensor, ...]], device: torch.device
) -> tuple[Tensor, ...]:
    """Applies ``compute`` to images of one size at a time and puts the rows back in order.

    ``compute`` takes uint8 ``(B, C, H, W)`` on ``device``; its results come back as float32 on the CPU.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, image in enumerate(images):
        groups.setdefault(image.shape, []).append(row)
    parts = []
    for rows in groups.values():
        batch_BCHW = torch.from_numpy(np.stack([images[row] for row in rows])).permute(0, 3, 1, 2)
        parts.append([result.float().cpu() for result in compute(batch_BCHW.to(device))])
    order = torch.tensor([row for rows in groups.values() for row in rows]).argsort()
    return tuple(torch.cat(results)[order] for results in zip(*parts, strict=True))
