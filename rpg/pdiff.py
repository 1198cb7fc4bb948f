"""The baselines p-diff, p-diff with an autoencoder, and the autoencoder alone: a whole network is one vector.

p-diff denoises the vector itself, with the denoiser of RPG's tokens but without a condition and with the time added;
with an autoencoder it denoises the latents instead; the autoencoder alone decodes standard normal latents. All weights
of the denoiser's embeddings and of the autoencoder's linear maps grow with the network: p-diff is what RPG outgrows.

Dimensions: B networks, N values of one network, padded, Z latent values.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.config import require_at_least, require_choice
from common.conversion import from_config
from common.errors import ConfigError
from rpg.denoiser import NORMS, ConvDenoiser, check_channels
from rpg.noise_schedule import PREDICTIONS, TokenDiffusion, linear_tables
from rpg.vae import ParameterVAE, VAEConfig

KINDS = ("pdiff", "pdiff_vae", "vae")


@dataclass(frozen=True, kw_only=True)
class PdiffConfig:
    """Options ``model.*`` of the baselines."""

    kind: Literal["pdiff", "pdiff_vae", "vae"] = "pdiff"  # diffusion of weights; of latents; no diffusion
    channels: tuple[int, ...] = (1, 64, 128, 256, 512, 256, 128, 64, 1)  # of the denoiser
    kernel_size: int = 7
    norm: Literal["batch", "group", "none"] = "batch"  # of the denoiser
    diffusion_steps: int = 1000  # T
    beta: tuple[float, float] = (1e-4, 0.02)
    prediction: Literal["noise", "x0", "v"] = "noise"  # what the denoiser puts out
    min_snr_gamma: float | None = None  # weight of the loss over times; null: 1
    standardise: bool = True  # of pdiff_vae: latents get mean 0 and deviation 1 first; false: the released baseline
    vae: VAEConfig = field(default_factory=VAEConfig)

    def __post_init__(self) -> None:
        require_choice("model.kind", self.kind, KINDS)
        require_choice("model.norm", self.norm, NORMS)
        require_choice("model.prediction", self.prediction, PREDICTIONS)
        check_channels(self.channels, self.kernel_size)
        require_at_least("model.diffusion_steps", self.diffusion_steps, 2)
        if len(self.beta) != 2:
            raise ConfigError(f"model.beta={list(self.beta)} must hold two numbers, the first and the last beta.")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ConfigError(f"model.min_snr_gamma={self.min_snr_gamma} must be positive; null switches it off.")

    @property
    def has_vae(self) -> bool:
        return self.kind != "pdiff"

    @property
    def has_diffusion(self) -> bool:
        return self.kind != "vae"

    def options(self) -> dict[str, Any]:
        """JSON-able; ``read_pdiff_config`` reads it."""
        return asdict(self)


def read_pdiff_config(options: dict[str, Any]) -> PdiffConfig:
    """The configuration of saved options.

    Raises: ConfigError for an option that does not exist.
    """
    return from_config(PdiffConfig, options, "model")


class VectorDiffusion(nn.Module):
    """Denoises vectors of ``size`` values. Called for training, it returns the summed squared error of the noise.

    Source: p-diff (Wang et al., 2024). Keys of the state dict are ``net.*``.
    """

    def __init__(self, size: int, config: PdiffConfig) -> None:
        super().__init__()
        self.size = size
        self.net = ConvDenoiser(
            config.channels, size, None, kernel_size=config.kernel_size, norm=config.norm, mode="add"
        )
        self.diffusion = TokenDiffusion(
            linear_tables(*config.beta, config.diffusion_steps),
            prediction=config.prediction,
            min_snr_gamma=config.min_snr_gamma,
        )

    def forward(self, x0_BN: Tensor, t_B: Tensor, eps_BN: Tensor) -> Tensor:
        """Squared error summed over all values that are not padding (NaN), float32."""
        predicted_BN = self.net(self.diffusion.noise(x0_BN, t_B, eps_BN), t_B).float()
        target_BN = self.diffusion.target(x0_BN, t_B, eps_BN)
        weight_B = self.diffusion.weight(t_B)
        if weight_B is not None:
            root_B1 = weight_B.sqrt()[:, None]
            predicted_BN, target_BN = root_B1 * predicted_BN, root_B1 * target_BN
        # where, not a product: whatever stands under padding must not reach the sum or a gradient
        return torch.where(torch.isnan(x0_BN), 0.0, predicted_BN - target_BN).square().sum()

    def predict_noise(self, x_BN: Tensor, t: int) -> Tensor:
        """The noise in ``x_BN`` at one time, for samplers."""
        output_BN = self.net(x_BN, torch.full((1,), t, device=x_BN.device)).float()
        return self.diffusion.to_noise(output_BN, x_BN, float(self.diffusion.abar_T[t]))


class LatentScale(nn.Module):
    """Mean and deviation that latents are standardised by; both buffers, so that they travel with the weights."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def fit(self, latent_KZ: Tensor) -> "LatentScale":
        """Takes the statistics of ``latent_KZ``; a value that never varies keeps deviation 1."""
        self.mean.copy_(latent_KZ.mean(0))
        # one deviation for all values: their relative sizes say which of them matter
        std = (latent_KZ - self.mean).square().mean().sqrt()
        self.std.fill_(float(std) if float(std) > 0 else 1.0)
        return self

    def encode(self, latent_BZ: Tensor) -> Tensor:
        return (latent_BZ - self.mean) / self.std

    def decode(self, latent_BZ: Tensor) -> Tensor:
        return latent_BZ * self.std + self.mean


class PdiffModel(nn.Module):
    """All trained parts of a baseline: ``diffusion.net.*``, ``vae.*``, ``latent.*``, as far as its kind has them.

    Args:
        num_values: N of the data, before the autoencoder's own padding.
    """

    def __init__(self, num_values: int, config: PdiffConfig) -> None:
        super().__init__()
        self.config, self.num_values = config, num_values
        if config.has_vae:
            self.vae = ParameterVAE(num_values, config.vae)
            self.latent = LatentScale(config.vae.d_latent)
        if config.has_diffusion:
            self.diffusion = VectorDiffusion(self.size, config)

    @property
    def size(self) -> int:
        """Values of the vectors that are drawn: of a network, or of a latent."""
        return self.config.vae.d_latent if self.config.has_vae else self.num_values

    def to_network(self, drawn_BV: Tensor) -> Tensor:
        """Vectors (B, N) of what was drawn."""
        if not self.config.has_vae:
            return drawn_BV
        return self.vae.decode(self.latent.decode(drawn_BV)).float()[:, : self.num_values]
