"""Ending a sequence early: what follows the first end-of-text token that the network writes is not sampled.

Skipped positions stay masked while the row is sampled, which leaves the law of what comes before them as it is: not
revealing a position is the same as averaging over it. Afterwards they hold ``fill_id``.

Dimensions: R sequences in flight, L positions.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When a row is complete although positions are still masked.

    Attributes:
        ids: tokens that end a text; only those that the network wrote count, so a prompt may hold them.
        fill_id: what masked positions behind the first of them get (padding).
    """

    ids: Collection[int]
    fill_id: int

    def __post_init__(self) -> None:
        if not self.ids:
            raise ConfigError("a stop rule needs at least one token id; give the model's end-of-text id.")

    def first(self, tokens_RL: Tensor, written_RL: Tensor) -> Tensor:
        """Position of each row's first stop token among those written so far, L where there is none."""
        ids = torch.tensor(sorted(self.ids), device=tokens_RL.device)
        hit_RL = written_RL & torch.isin(tokens_RL, ids)
        length = tokens_RL.shape[1]
        position_L = torch.arange(length, device=tokens_RL.device)
        return torch.where(hit_RL, position_L, length).amin(1)

    def behind(self, tokens_RL: Tensor, written_RL: Tensor) -> Tensor:
        """Bool ``(R, L)``: positions after each row's first stop token."""
        position_L = torch.arange(tokens_RL.shape[1], device=tokens_RL.device)
        return position_L > self.first(tokens_RL, written_RL)[:, None]
