"""What a training step of the p-diff baselines computes, and the vectors that it reads.

Dimensions: B networks of a batch, K checkpoints, N values of one network, Z latent values.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from common.seeding import generator
from common.task import Batch, Draws, StepOutput, Task
from rpg.pdiff import PdiffConfig, VectorDiffusion
from rpg.store import TokenStore
from rpg.vae import ParameterVAE


class NetworkVectors:
    """All tokens of a network as one vector ``x`` (B, N).

    Args:
        length: vectors are padded to it, and all padding becomes 0 (the autoencoder); None: padding stays as it is.
    """

    def __init__(self, tokens: TokenStore, length: int | None = None) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.tokens)

    def fetch(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        x_BN = torch.stack([self.tokens.network(int(row)).flatten() for row in rows])
        if self.length is not None:
            x_BN = F.pad(torch.nan_to_num(x_BN), (0, self.length - x_BN.shape[1]))
        return {"x": x_BN}


class Latents:
    """Vectors in memory, ``x`` (B, Z)."""

    def __init__(self, latent_KZ: Tensor) -> None:
        self.latent_KZ = latent_KZ

    def __len__(self) -> int:
        return len(self.latent_KZ)

    def fetch(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        return {"x": self.latent_KZ[torch.from_numpy(rows)]}


class VectorDiffusionTask(Task):
    """Training of the denoiser of whole vectors; the loss is a mean over values that are not padding.

    Args:
        size: values of a vector.
        seed: of times and noise.
    """

    def __init__(self, size: int, config: PdiffConfig, *, seed: int) -> None:
        self.size, self.config, self.seed = size, config, seed

    def build_model(self) -> nn.Module:
        return VectorDiffusion(self.size, self.config)

    def draw(self, step: int, size: int) -> dict[str, Tensor]:
        return {
            "t": torch.randint(
                self.config.diffusion_steps, (size,), generator=generator(self.seed, "vector time", step)
            ),
            "noise": torch.randn(size, self.size, generator=generator(self.seed, "vector noise", step)),
        }

    def count(self, batch: Batch, draws: Draws) -> float:
        """Values that are not padding."""
        return float((~torch.isnan(batch["x"])).sum())

    def training_step(self, model: nn.Module, batch: Batch, draws: Draws) -> StepOutput:
        return StepOutput(loss_sum=model(batch["x"], draws["t"], draws["noise"]))

    def repeated_blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.net.levels)


class VAETask(Task):
    """Training of the autoencoder; the loss is a mean over networks.

    Args:
        num_values: N, before the autoencoder's own padding.
        seed: of the latents' draws and of added noise.
    """

    def __init__(self, num_values: int, config: PdiffConfig, *, seed: int) -> None:
        self.num_values, self.options, self.seed = num_values, config.vae, seed

    def build_model(self) -> nn.Module:
        return ParameterVAE(self.num_values, self.options)

    def draw(self, step: int, size: int) -> dict[str, Tensor]:
        options, draws = self.options, {}
        for name, wanted, length in (
            ("eps_BZ", options.use_variance, options.d_latent),
            ("latent_noise_BZ", options.latent_noise > 0, options.d_latent),
            ("input_noise_BN", options.input_noise > 0, options.padded_length(self.num_values)),
        ):
            if wanted:
                draws[name] = torch.randn(size, length, generator=generator(self.seed, f"vae {name}", step))
        return draws

    def training_step(self, model: nn.Module, batch: Batch, draws: Draws) -> StepOutput:
        x_BN = batch["x"]
        loss = model(x_BN, **{name: value for name, value in draws.items() if name != "rows"})
        size = float(len(x_BN))
        metrics = {"squared_error": (loss.squared_error * size, size)}
        if self.options.use_variance:
            metrics["kl"] = (loss.kl * size, size)
        return StepOutput(loss_sum=loss.total * size, metrics=metrics)
