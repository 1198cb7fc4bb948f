"""How a sequence is divided among processes that attend to each other's keys (ring attention).

Full attention costs every position the same, so ``contiguous`` slices are balanced; ``zigzag`` gives each process one
early and one late chunk, which balances causal attention, for instance of the autoregressive baseline.

Dimensions: B batch, L sequence, W processes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.config import require_at_least, require_choice
from common.errors import ConfigError

MODES = ("contiguous", "zigzag")


def shard_sequence(x: Tensor, world: int, mode: str = "contiguous", *, dim: int = 1) -> list[Tensor]:
    """One view or copy of ``x`` per process, ``(B, L / W, ...)`` each.

    Noise and times must be drawn for the whole sequence first, labels shifted and position ids made first, and all of
    them sharded alike: a shift inside a shard would lose the label at its edge.

    Args:
        x: ``(B, L, ...)``.
        world: W.
        mode: ``contiguous``: L/W neighbours; ``zigzag``: of 2W chunks, process r gets chunks r and 2W - 1 - r.
        dim: of the sequence.

    Source: specification 12. Raises: ConfigError if L cannot be divided evenly.
    """
    require_choice("mode", mode, MODES)
    require_at_least("world", world, 1)
    parts = world if mode == "contiguous" else 2 * world
    length = x.shape[dim]
    if length % parts:
        nearest = f"{length // parts * parts} and {-(-length // parts) * parts}" if length >= parts else f"{parts}"
        raise ConfigError(
            f"a sequence of length={length} cannot be divided into {parts} equal parts ({mode}, {world} processes); "
            f"the nearest lengths that can: {nearest}."
        )
    chunks = x.chunk(parts, dim=dim)
    if mode == "contiguous":
        return list(chunks)
    return [torch.cat([chunks[rank], chunks[parts - 1 - rank]], dim=dim) for rank in range(world)]


def unshard_sequence(shards: Sequence[Tensor], mode: str = "contiguous", *, dim: int = 1) -> Tensor:
    """The sequence whose shards, in order of rank, these are."""
    require_choice("mode", mode, MODES)
    if mode == "contiguous":
        return torch.cat(list(shards), dim=dim)
    halves = [shard.chunk(2, dim=dim) for shard in shards]
    return torch.cat([early for early, _ in halves] + [late for _, late in reversed(halves)], dim=dim)
