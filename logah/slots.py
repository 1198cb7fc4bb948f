"""What a step of the hypernetwork reads: which places of the meta-batch are this process's, and the mini-batch that all
networks of the step share."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common.data.loader import TrainLoader
from logah.data import TrainingData


class Slots(torch.utils.data.Dataset):
    """Row ``step * meta_batch + slot``: one network's place in one step.

    ``fetch`` gives ``step`` and ``slot`` per row, and once the images and labels, or tokens, of their step.
    """

    rows_per_read = 1

    def __init__(self, data: TrainingData, meta_batch: int, total_steps: int) -> None:
        self.data, self.meta_batch, self.total_steps = data, meta_batch, total_steps

    def __len__(self) -> int:
        return self.meta_batch * self.total_steps

    def fetch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        rows = np.asarray(rows, dtype=np.int64)
        step = int(rows[0]) // self.meta_batch
        assert (rows // self.meta_batch == step).all(), "a micro-batch lies within one step"
        places = {"slot": torch.from_numpy(rows % self.meta_batch), "step": torch.full((len(rows),), step)}
        return places | dict(self.data.training_batch(step))


class InOrder:
    """Rows in their order, for ever; a run that is made longer does not begin again."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def rows(self, start: int, count: int) -> np.ndarray:
        return np.arange(start, start + count)


def build_slot_loader(slots: Slots, *, micro_size: int, seed: int, rank: int, world_size: int) -> TrainLoader:
    """The engine's loader of ``slots``; ``data.num_workers`` processes read ahead."""
    loader = TrainLoader(
        slots,
        global_size=slots.meta_batch,
        micro_size=micro_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        num_workers=slots.data.section.num_workers,
        shuffle=False,
    )
    loader.order = InOrder(slots.data.num_train)  # what a resumed run must find unchanged
    return loader
