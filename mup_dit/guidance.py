"""Denoisers for the samplers: the network with its condition, guided in one call of twice the rows.

Dimensions: B rows, C channels, S side.

Source: Ho and Salimans (2022); Kynkaanniemi et al. (2024) for the interval; Karras et al. (2024) for autoguidance;
specification 3.2, 5.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from mup_dit.dit import GUIDED_CHANNELS

Condition = Mapping[str, Tensor]
CHANNELS = ("three", "all")


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly the condition is emphasised, and where.

    Attributes:
        scale: u + scale (c - u); 1: the conditional network alone.
        channels: that are guided: the first three (the reference's DiT), or all of the prediction.
        start, end: share of the process, as the network's time over its largest (1 is pure noise), inside which
            guidance acts; outside it the network is called with the condition alone.
    """

    scale: float = 1.0
    channels: str = "three"
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 1.0 <= self.scale < math.inf:
            raise ConfigError(
                f"sampling.cfg_scale={self.scale}: guidance below 1 pushes away from the condition; use 1 for none."
            )
        if self.channels not in CHANNELS:
            raise ConfigError(f"sampling.cfg_channels={self.channels} is not known; choose one of three, all.")
        if not 0.0 <= self.start < self.end <= 1.0:
            raise ConfigError(
                f"sampling.cfg_interval=[{self.start}, {self.end}] is no part of [0, 1], whose ends are data and noise."
            )

    def acts_at(self, share: float) -> bool:
        return self.scale != 1.0 and self.start <= share <= self.end


class GuidedDenoiser:
    """``(x, time) -> output`` for one batch of conditions.

    Args:
        network: called as ``network(x, t_B, **condition)``.
        condition: of each row.
        null: what replaces it without a condition; tensors of the same names. Those left out (a caption's mask) are
            shared: the network repeats them, or they are doubled if their name is in ``condition`` only.
        last_time: the network's largest time, 999 or 1.
        weak: a poorer network to be guided away from, with the same condition (autoguidance); it is called apart.

    Attributes:
        evaluations: network rows evaluated so far, over rows: the cost of a sample.
    """

    def __init__(
        self,
        network: nn.Module,
        condition: Condition,
        null: Condition,
        guidance: Guidance,
        *,
        last_time: float,
        weak: nn.Module | None = None,
    ) -> None:
        self._network, self._condition, self._guidance, self._weak = network, condition, guidance, weak
        self._both = {
            name: torch.cat([values, null.get(name, values)]) for name, values in condition.items()
        }  # made once, not in every step
        self._last_time = last_time
        self.evaluations = 0

    def __call__(self, x_BCSS: Tensor, time: float) -> Tensor:
        if not self._guidance.acts_at(time / self._last_time):
            return self._call(self._network, x_BCSS, time, self._condition)
        if self._weak is not None:
            with_B = self._call(self._network, x_BCSS, time, self._condition)
            without_B = self._call(self._weak, x_BCSS, time, self._condition)
        else:
            both = self._call(self._network, torch.cat([x_BCSS, x_BCSS]), time, self._both)
            with_B, without_B = both.chunk(2)
            self.evaluations += 1
        channels = x_BCSS.shape[1]
        count = min(GUIDED_CHANNELS, channels) if self._guidance.channels == "three" else channels
        guided = torch.lerp(without_B[:, :count], with_B[:, :count], self._guidance.scale)
        return torch.cat([guided, with_B[:, count:]], dim=1)

    def _call(self, network: nn.Module, x: Tensor, time: float, condition: Condition) -> Tensor:
        self.evaluations += 1
        # float32 for every dtype of the network: in bfloat16 times would be rounded
        t_B = torch.full((len(x),), time, dtype=torch.float32, device=x.device)
        return network(x, t_B, **condition).float()
