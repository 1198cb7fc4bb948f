"""The variational autoencoder of p-diff: a whole network, as one vector, to a short latent and back.

Strided 1-D convolutions halve the vector's length level by level, three linear maps give mean and log-variance of the
latent; the decoder mirrors them with transposed convolutions. Keys are those of the released implementation.

Dimensions: B networks, N values of one network, padded, Z latent values, C channels, S length at the innermost level.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import require_at_least
from common.errors import ConfigError
from rpg.normalisation import BatchNorm


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Options ``model.vae.*``."""

    channels: tuple[int, ...] = (64, 256, 384, 512, 64)  # of the encoder's levels, each halving the length
    d_latent: int = 256
    kernel_size: int = 7
    divide: int = 64  # networks are padded to a multiple of this, which must be a multiple of 2^levels
    kl_weight: float = 0.01  # of the KL divergence beside the mean square
    use_variance: bool = False  # draw the latent with its variance and add the KL; false: the latent is its mean
    latent_noise: float = 0.0  # std of noise added to the latent before decoding
    input_noise: float = 0.0  # std of noise added to the input before encoding

    def __post_init__(self) -> None:
        shown = list(self.channels)
        if not self.channels or min(self.channels) < 1:
            raise ConfigError(f"model.vae.channels={shown} must hold at least one level, all of positive width.")
        require_at_least("model.vae.d_latent", self.d_latent, 1)
        for name in ("kl_weight", "latent_noise", "input_noise"):
            require_at_least(f"model.vae.{name}", getattr(self, name), 0)
        if self.kernel_size < 3 or self.kernel_size % 2 == 0:
            raise ConfigError(
                f"model.vae.kernel_size={self.kernel_size} cannot halve and double lengths exactly; use an odd number, "
                "at least 3."
            )
        if self.divide < 1 or self.divide % 2 ** len(self.channels):
            near = max(1, round(self.divide / 2 ** len(self.channels))) * 2 ** len(self.channels)
            raise ConfigError(
                f"model.vae.divide={self.divide} cannot be halved {len(self.channels)} times, once per entry of "
                f"model.vae.channels={shown}; use {near}, a multiple of {2 ** len(self.channels)}."
            )

    def padded_length(self, length: int) -> int:
        """The multiple of ``divide`` that a network of ``length`` values is padded to."""
        return math.ceil(length / self.divide) * self.divide


class VAELoss(NamedTuple):
    """Means over a batch; ``total`` is differentiable."""

    total: Tensor
    squared_error: Tensor
    kl: Tensor


class ParameterVAE(nn.Module):
    """Mean and log-variance of the latent of a vector of network weights, and the vector of a latent.

    Args:
        length: values of one network; inputs have ``padded_length``, the next multiple of ``config.divide``.

    Source: p-diff (Wang et al., 2024), the autoencoder before the latent diffusion, with the layers of RPG's released
    baseline; the reference there reverses the caller's list of channels, here it is left alone.
    """

    def __init__(self, length: int, config: VAEConfig) -> None:
        super().__init__()
        self.config, self.padded_length = config, config.padded_length(length)
        channels, kernel = config.channels, config.kernel_size
        self.last_length = self.padded_length // 2 ** len(channels)
        flat = channels[-1] * self.last_length
        self.encoder = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(inside, outside, kernel, stride=2, padding=kernel // 2),
                BatchNorm(outside),
                nn.LeakyReLU(),
            )
            for inside, outside in zip((1, *channels), channels, strict=False)
        )
        self.to_latent = nn.Linear(flat, config.d_latent)
        self.fc_mu = nn.Linear(config.d_latent, config.d_latent)
        self.fc_var = nn.Linear(config.d_latent, config.d_latent)
        self.to_decode = nn.Linear(config.d_latent, flat)
        mirrored = channels[::-1]
        self.decoder = nn.ModuleList(
            nn.Sequential(_doubling(inside, outside, kernel), BatchNorm(outside), nn.ELU())
            for inside, outside in zip(mirrored, mirrored[1:], strict=False)
        )
        self.final_layer = nn.Sequential(
            _doubling(mirrored[-1], mirrored[-1], kernel),
            BatchNorm(mirrored[-1]),
            nn.ELU(),
            nn.Conv1d(mirrored[-1], 1, kernel, padding=kernel // 2),
        )

    def encode(self, x_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latent, each ``(B, Z)``.

        Raises: ConfigError unless the vectors have ``padded_length`` values.
        """
        if x_BN.shape[-1] != self.padded_length:
            raise ConfigError(
                f"a vector of {x_BN.shape[-1]} values does not fit this autoencoder, which reads {self.padded_length} "
                f"(a multiple of model.vae.divide={self.config.divide}); pad it with zeros (ParameterVAE.pad)."
            )
        hidden_BCN = x_BN[:, None]
        for level in self.encoder:
            hidden_BCN = level(hidden_BCN)
        hidden_BZ = self.to_latent(hidden_BCN.flatten(1))
        return self.fc_mu(hidden_BZ), self.fc_var(hidden_BZ)

    def decode(self, z_BZ: Tensor) -> Tensor:
        """Vectors ``(B, N)`` of ``padded_length`` values."""
        hidden_BCS = self.to_decode(z_BZ).unflatten(1, (-1, self.last_length))
        for level in self.decoder:
            hidden_BCS = level(hidden_BCS)
        return self.final_layer(hidden_BCS)[:, 0]

    def pad(self, x_BN: Tensor) -> Tensor:
        """``x_BN`` with zeros up to ``padded_length``; padding that is NaN becomes zero.

        Raises: ConfigError if the vectors are longer than that.
        """
        missing = self.padded_length - x_BN.shape[-1]
        if missing < 0:
            raise ConfigError(
                f"a vector of {x_BN.shape[-1]} values is longer than the {self.padded_length} that this autoencoder "
                "reads; build it for the longest network."
            )
        return F.pad(torch.nan_to_num(x_BN), (0, missing))

    def forward(
        self,
        x_BN: Tensor,
        *,
        eps_BZ: Tensor | None = None,
        input_noise_BN: Tensor | None = None,
        latent_noise_BZ: Tensor | None = None,
    ) -> VAELoss:
        """The loss: mean square of the reconstruction; with ``config.use_variance`` plus ``kl_weight`` times the KL.

        Args:
            eps_BZ: standard normal draws of the latent; needed if ``config.use_variance``.
            input_noise_BN, latent_noise_BZ: standard normal draws, multiplied by ``config.input_noise`` and
                ``config.latent_noise``; None: no noise.

        The divergence is summed over the latent's values and averaged over the batch.
        """
        noised_BN = x_BN if input_noise_BN is None else x_BN + self.config.input_noise * input_noise_BN
        mean_BZ, log_variance_BZ = self.encode(noised_BN)
        z_BZ = mean_BZ
        if self.config.use_variance:
            z_BZ = mean_BZ + torch.exp(0.5 * log_variance_BZ) * eps_BZ
        if latent_noise_BZ is not None:
            z_BZ = z_BZ + self.config.latent_noise * latent_noise_BZ
        squared = F.mse_loss(self.decode(z_BZ).float(), x_BN)
        if not self.config.use_variance:
            # a zero keeps the log-variance in the graph: data-parallel training waits for all gradients
            unused = 0.0 * log_variance_BZ.float().sum()
            return VAELoss(squared + unused, squared.detach(), torch.zeros_like(squared))
        kl_B = 0.5 * (mean_BZ**2 + log_variance_BZ.exp() - 1 - log_variance_BZ).float().sum(1)
        kl = kl_B.mean()
        return VAELoss(squared + self.config.kl_weight * kl, squared.detach(), kl.detach())


def _doubling(inside: int, outside: int, kernel_size: int) -> nn.ConvTranspose1d:
    """Doubles the length exactly."""
    return nn.ConvTranspose1d(inside, outside, kernel_size, stride=2, padding=kernel_size // 2, output_padding=1)
