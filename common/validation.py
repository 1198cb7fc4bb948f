"""Mean loss over a fixed set of batches, the same on any number of processes."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from common.meters import WeightedMeans
from common.parallel import Parallel
from common.task import Batch, Task


class ValidationLoader(Protocol):
    """A finite, fixed set of batches, shared out among ranks."""

    def batches(self, rank: int, world_size: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """This rank's ``(index over all ranks, batch)`` pairs."""


def validate(
    task: Task,
    module: nn.Module,
    loader: ValidationLoader,
    parallel: Parallel,
    *,
    to_device: Callable[[Batch], Batch],
    in_step: bool,
) -> dict[str, float]:
    """``validation/loss`` and the task's metrics, weighted by their counts over all ranks. Collective.

    Args:
        in_step: the forward pass communicates, so every rank must run equally many.
    """
    means = WeightedMeans()
    for index, batch, is_mine in _batches(loader, parallel, in_step):
        size = len(next(iter(batch.values())))
        draws = {**task.validation_draw(index, size), "rows": torch.arange(size)}
        batch, draws = to_device(batch), to_device(draws)
        output = task.validation_step(module, batch, draws)
        if is_mine:
            means.add("validation/loss", output.loss_sum, task.count(batch, draws))
            for name, (value, weight) in output.metrics.items():
                means.add(f"validation/{name}", value, weight)
    return means.means(parallel)


def _batches(loader: ValidationLoader, parallel: Parallel, in_step: bool) -> Iterator[tuple[int, Batch, bool]]:
    """(index, batch, whether it counts)."""
    mine = iter(loader.batches(parallel.rank, parallel.world_size))
    if not in_step:
        yield from ((index, batch, True) for index, batch in mine)
        return
    spare = next(iter(loader.batches(0, 1)))  # for a rank that has run out while others have not
    while True:
        item = next(mine, None)
        if not parallel.max([float(item is not None)])[0]:
            return
        yield (*(item or spare), item is not None)
