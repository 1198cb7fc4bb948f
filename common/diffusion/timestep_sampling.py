"""Which steps t are trained on: all alike, or by the size of their loss.

Dimensions: B rows of the global batch, T steps.

Source: Nichol and Dhariwal (2021), section 3.3; ``mup_dit`` specification 4.2.
"""

import torch
from torch import Tensor

from common.config import require_at_least, require_choice
from common.errors import CheckpointError

SAMPLERS = ("uniform", "loss-second-moment")
HISTORY = 10  # losses remembered per step
UNIFORM_SHARE = 0.001  # of the draws, so that no step is forgotten


class UniformTimesteps:
    """Every step alike; weights are one."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def probabilities(self) -> Tensor:
        """float64 ``(T,)``, summing to one."""
        return torch.full((self.num_steps,), 1.0 / self.num_steps, dtype=torch.float64)

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Steps ``(B,)`` and their importance weights 1/(T p), which keep the loss's expectation."""
        times_B = torch.randint(self.num_steps, (size,), generator=generator)
        return times_B, torch.ones(size)

    def update(self, times_B: Tensor, losses_B: Tensor) -> None:
        """Takes note of what a step's rows lost."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """There is nothing to restore."""


class LossSecondMoment(UniformTimesteps):
    """p proportional to the root of the mean squared loss of the last ``history`` rows at each step.

    Uniform until every step has a full history. ``update`` must see the rows of the whole global batch in order, the
    same on every process; then all processes draw alike.
    """

    def __init__(self, num_steps: int, history: int = HISTORY, uniform_share: float = UNIFORM_SHARE) -> None:
        super().__init__(num_steps)
        require_at_least("history", history, 1)
        self.uniform_share = uniform_share
        self.losses_TH = torch.zeros(num_steps, history, dtype=torch.float64)
        self.counts_T = torch.zeros(num_steps, dtype=torch.long)

    def probabilities(self) -> Tensor:
        if int(self.counts_T.min()) < self.losses_TH.shape[1]:
            return super().probabilities()
        size_T = self.losses_TH.square().mean(1).sqrt()
        return size_T / size_T.sum() * (1 - self.uniform_share) + self.uniform_share / self.num_steps

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        p_T = self.probabilities()
        times_B = torch.multinomial(p_T, size, replacement=True, generator=generator)
        return times_B, (1.0 / (self.num_steps * p_T[times_B])).float()

    def update(self, times_B: Tensor, losses_B: Tensor) -> None:
        history = self.losses_TH.shape[1]
        for t, loss in zip(times_B.tolist(), losses_B.tolist(), strict=True):
            if self.counts_T[t] == history:
                self.losses_TH[t] = self.losses_TH[t].roll(-1)
                self.losses_TH[t, -1] = loss
            else:
                self.losses_TH[t, self.counts_T[t]] = loss
                self.counts_T[t] += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self.losses_TH.clone(), "counts": self.counts_T.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises: CheckpointError for a history of another size."""
        if state["losses"].shape != self.losses_TH.shape:
            raise CheckpointError(
                f"the time sampler's history has shape {tuple(state['losses'].shape)}, this process needs "
                f"{tuple(self.losses_TH.shape)}; resume with the same number of diffusion steps."
            )
        self.losses_TH, self.counts_T = state["losses"].clone(), state["counts"].clone()


def build_timestep_sampler(name: str, num_steps: int) -> UniformTimesteps:
    """Raises: ConfigError for an unknown name."""
    require_choice("objective.time_sampler", name, SAMPLERS)
    return UniformTimesteps(num_steps) if name == "uniform" else LossSecondMoment(num_steps)
