"""Tables of the diffusion over tokens, and the training target.

Dimensions: T times, R rows, D values.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import ConfigError

PREDICTIONS = ("noise", "x0", "v")
Prediction = Literal["noise", "x0", "v"]


@dataclass(frozen=True)
class ScheduleTables:
    """Float32 tables over the T times; ``abar`` is the product of 1 - beta."""

    beta_T: Tensor
    abar_T: Tensor

    @property
    def signal_rate_T(self) -> Tensor:
        return self.abar_T.sqrt()

    @property
    def noise_rate_T(self) -> Tensor:
        return (1 - self.abar_T).sqrt()

    @property
    def coeff_1_T(self) -> Tensor:
        """Factor on x_t in the mean of x_{t-1}."""
        return (1 / (1 - self.beta_T)).sqrt()

    @property
    def coeff_2_T(self) -> Tensor:
        """Factor on the predicted noise in the mean of x_{t-1}."""
        # 1 - alpha instead of beta: the same but for the last bits, which are those of released checkpoints
        return self.coeff_1_T * (1 - (1 - self.beta_T)) / (1 - self.abar_T).sqrt()

    @property
    def posterior_variance_T(self) -> Tensor:
        before_T = torch.cat([torch.ones_like(self.abar_T[:1]), self.abar_T[:-1]])
        return self.beta_T * (1 - before_T) / (1 - self.abar_T)


def linear_tables(beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000) -> ScheduleTables:
    """Betas that rise linearly, both ends included.

    Source: Ho et al., 2020 (DDPM).

    Raises: ConfigError for betas outside (0, 1) or less than two steps.
    """
    if steps < 2:
        raise ConfigError(f"model.diffusion_steps={steps} is too small; it must be at least 2, usually 1000.")
    if not 0 < beta_start <= beta_end < 1:
        raise ConfigError(f"model.beta=[{beta_start}, {beta_end}] must satisfy 0 < first <= last < 1.")
    beta_T = torch.linspace(beta_start, beta_end, steps)
    return ScheduleTables(beta_T, torch.cumprod(1 - beta_T, 0))


class TokenDiffusion(nn.Module):
    """Noises tokens and says what the network is trained to predict. Its tables are no part of a state dict.

    Args:
        prediction: what the network puts out: the noise (released), the clean token, or v.
        min_snr_gamma: weight of a time, ``min(SNR, gamma) / SNR`` for noise; None: 1 for all (released).

    Source: Salimans and Ho, 2022 (v); Hang et al., 2023 (min-SNR).
    """

    def __init__(
        self, tables: ScheduleTables, *, prediction: Prediction = "noise", min_snr_gamma: float | None = None
    ) -> None:
        super().__init__()
        self.prediction, self.min_snr_gamma = prediction, min_snr_gamma
        self.register_buffer("beta_T", tables.beta_T, persistent=False)
        self.register_buffer("abar_T", tables.abar_T, persistent=False)

    @property
    def tables(self) -> ScheduleTables:
        return ScheduleTables(self.beta_T, self.abar_T)

    @property
    def num_steps(self) -> int:
        return len(self.abar_T)

    def noise(self, x0_RD: Tensor, t_R: Tensor, eps_RD: Tensor) -> Tensor:
        """x_t; padding (NaN) counts as 0."""
        signal_R1, rate_R1 = self._rates(t_R)
        return signal_R1 * torch.nan_to_num(x0_RD) + rate_R1 * eps_RD

    def target(self, x0_RD: Tensor, t_R: Tensor, eps_RD: Tensor) -> Tensor:
        """What the network should put out."""
        if self.prediction == "noise":
            return eps_RD
        x0_RD = torch.nan_to_num(x0_RD)
        if self.prediction == "x0":
            return x0_RD
        signal_R1, rate_R1 = self._rates(t_R)
        return signal_R1 * eps_RD - rate_R1 * x0_RD

    def weight(self, t_R: Tensor) -> Tensor | None:
        """Factor on the squared error of each row; None: 1."""
        if self.min_snr_gamma is None:
            return None
        snr_R = self.abar_T[t_R] / (1 - self.abar_T[t_R])
        capped_R = snr_R.clamp(max=self.min_snr_gamma)
        return {"noise": capped_R / snr_R, "x0": capped_R, "v": capped_R / (snr_R + 1)}[self.prediction]

    def to_noise(self, output_RD: Tensor, x_RD: Tensor, abar: float) -> Tensor:
        """The predicted noise of a network output at one time."""
        if self.prediction == "noise":
            return output_RD
        signal, rate = abar**0.5, (1 - abar) ** 0.5
        if self.prediction == "x0":
            return (x_RD - signal * output_RD) / rate
        return signal * output_RD + rate * x_RD

    def _rates(self, t_R: Tensor) -> tuple[Tensor, Tensor]:
        abar_R1 = self.abar_T[t_R][:, None]
        return abar_R1.sqrt(), (1 - abar_R1).sqrt()
