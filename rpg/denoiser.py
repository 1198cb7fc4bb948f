"""The denoiser of one token: a U-shaped stack of 1-D convolutions over the D values of a token.

The channels of the convolutions rise and fall while the length stays D; the time and the prototype of the token enter
every level as one more channel. Keys are those of the released checkpoints.

Dimensions: R rows (tokens of any networks), D values per token, C channels, P width of a prototype.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from rpg.normalisation import BatchNorm

TIME_FEATURES = 256
NORMS = ("batch", "group", "none")
MODES = ("multiply", "add")


class TimeEmbedder(nn.Module):
    """Cosines and sines of the time at 128 frequencies, through a two-layer network: ``(R,) -> (R, D)``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        half = TIME_FEATURES // 2
        # float32 rounding as of released checkpoints: an angle at t = 999 feels the last bit of its frequency
        self.register_buffer("freqs", torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half))
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, t_R: Tensor) -> Tensor:
        angle_RF = t_R.float()[:, None] * self.freqs
        return self.mlp(torch.cat([angle_RF.cos(), angle_RF.sin()], dim=-1))


class ConvLevel(nn.Sequential):
    """One convolution of the modulated input, then norm and ELU (neither after the output level)."""

    def __init__(self, inside: int, outside: int, kernel_size: int, *, norm: str, mode: str, is_output: bool) -> None:
        conv = nn.Conv1d(inside, outside, kernel_size, padding=kernel_size // 2)
        activation = nn.Identity() if is_output else nn.Sequential(_build_norm(norm, outside), nn.ELU())
        super().__init__(conv, activation)
        self.mode = mode

    def forward(self, x_RCD: Tensor, time_R1D: Tensor, condition_R1D: Tensor | None) -> Tensor:
        if self.mode == "multiply":
            x_RCD = (x_RCD + condition_R1D) * time_R1D
        else:
            x_RCD = x_RCD + time_R1D
        return self[1](self[0](x_RCD))


def _build_norm(norm: str, channels: int) -> nn.Module:
    if norm == "batch":
        return BatchNorm(channels)
    if norm == "group":
        return nn.GroupNorm(1, channels)
    return nn.Identity()


class ConvDenoiser(nn.Module):
    """Predicts the noise in tokens.

    Args:
        channels: of the levels, from 1 to 1, an odd number of entries, at least five; it is copied.
        size: D; also the width of the embeddings.
        condition_size: P, the width of the prototypes; None with ``mode="add"``.
        kernel_size: odd, so that the length stays D.
        norm: ``batch`` is the released one; ``group`` and ``none`` do not depend on the other rows.
        mode: ``multiply``: a level sees (x + condition) * time; ``add``: x + time (p-diff, without a condition).

    Source: RPG (Wang et al., 2025), the 1-D convolutional diffusion module; p-diff (Wang et al., 2024) for ``add``.

    Raises: ConfigError for channels or a kernel size that cannot work.
    """

    def __init__(
        self,
        channels: Sequence[int],
        size: int,
        condition_size: int | None,
        *,
        kernel_size: int = 7,
        norm: str = "batch",
        mode: str = "multiply",
    ) -> None:
        super().__init__()
        check_channels(channels, kernel_size)
        self.size, self.mode = size, mode
        self.time_embedder = TimeEmbedder(size)
        if mode == "multiply":
            self.condi_embedder = nn.Linear(condition_size, size)
        levels = [
            ConvLevel(inside, outside, kernel_size, norm=norm, mode=mode, is_output=index == len(channels) - 2)
            for index, (inside, outside) in enumerate(itertools.pairwise(channels))
        ]
        num_encoders = len(channels) // 2 + 1
        self.encoder_list = nn.ModuleList(levels[:num_encoders])
        self.decoder_list = nn.ModuleList(levels[num_encoders:])

    @property
    def levels(self) -> list[nn.Module]:
        return [*self.encoder_list, *self.decoder_list]

    def forward(self, x_RD: Tensor, t_R: Tensor, condition_RP: Tensor | None = None) -> Tensor:
        """Predicted noise ``(R, D)`` at integer times ``t_R``."""
        condition_RD = None if condition_RP is None else self.condi_embedder(condition_RP)
        return self.denoise(x_RD, self.time_embedder(t_R), condition_RD)

    def denoise(self, x_RD: Tensor, time_RD: Tensor, condition_RD: Tensor | None) -> Tensor:
        """The same from embeddings: both may be computed once and used again, and ``time_RD`` may have one row."""
        time_R1D = time_RD[:, None]
        condition_R1D = None if condition_RD is None else condition_RD[:, None]
        hidden, skips = x_RD[:, None], []
        for level in self.encoder_list:
            hidden = level(hidden, time_R1D, condition_R1D)
            skips.append(hidden)
        # the innermost two outputs are what the first decoder level reads anyway
        for level, skip in zip(self.decoder_list, reversed(skips[:-2]), strict=True):
            hidden = level(hidden + skip, time_R1D, condition_R1D)
        return hidden[:, 0]


def check_channels(channels: Sequence[int], kernel_size: int, name: str = "model") -> None:
    """Raises ConfigError unless the denoiser can be built of them."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ConfigError(
            f"{name}.kernel_size={kernel_size} would change the length of a token; use an odd number, for example "
            f"{max(kernel_size + 1, 3)}."
        )
    shown = f"{name}.channels={list(channels)}"
    if len(channels) < 5 or len(channels) % 2 == 0:
        raise ConfigError(f"{shown} must have an odd number of entries, at least 5, for example [1, 16, 32, 16, 1].")
    if channels[0] != 1 or channels[-1] != 1 or min(channels) < 1:
        raise ConfigError(f"{shown} must begin and end with 1 and hold positive numbers.")
    kept, num_encoders = list(channels[1 : len(channels) // 2]), len(channels) // 2 + 1
    if list(channels[num_encoders:-1]) != kept[::-1]:
        raise ConfigError(f"{shown} must rise and fall symmetrically: skips add a level's output to its mirror image.")


def row_flops(channels: Sequence[int], kernel_size: int, size: int) -> float:
    """Multiply-adds of the convolutions for one token, times two."""
    return 2.0 * size * kernel_size * sum(a * b for a, b in itertools.pairwise(channels))


def activation_bytes(channels: Sequence[int], size: int, element_size: int) -> int:
    """What one row keeps for backward: about four tensors a level (modulated twice, convolved, normalised)."""
    return 4 * element_size * size * sum(channels[:-1])
