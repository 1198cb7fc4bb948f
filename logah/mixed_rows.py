"""Training images that are mixed with others of their step (mixup, CutMix), for the engine's loader.

Dimensions: B images.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from logah.data import TrainingRows
from logah.mixing import apply_mix, draw_mix


class MixedRows(torch.utils.data.Dataset):
    """``rows``, each mixed with the image at the mirrored place of its step's batch.

    Args:
        rows: images and labels by position.
        batch_size: of a step, over all processes.
        mixup, cutmix, probability, switch: see ``mixing.draw_mix``.
    """

    def __init__(
        self, rows: TrainingRows, batch_size: int, *, mixup: float, cutmix: float, probability: float, switch: float
    ) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, rows.seed
        self.options = {"mixup": mixup, "cutmix": cutmix, "probability": probability, "switch": switch}

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, positions: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """``images``, ``labels``, ``other_labels`` and ``share`` at ``positions``, which may span several steps."""
        positions = np.asarray(positions, dtype=np.int64)
        step_B = positions // self.batch_size
        parts = [self._of_step(int(step), positions[step_B == step]) for step in np.unique(step_B)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _of_step(self, step: int, positions: np.ndarray) -> dict[str, Tensor]:
        first = self.rows.fetch(positions)
        height, width = first["images"].shape[-2:]
        mix = draw_mix(self.seed, step, size=(height, width), **self.options)
        if mix is None:
            return apply_mix(None, first, first)
        begin = step * self.batch_size
        return apply_mix(mix, first, self.rows.fetch(2 * begin + self.batch_size - 1 - positions))
