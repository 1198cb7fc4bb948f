"""Options of a generator's network; ``rpg/model.py`` builds it.

Sizes that the data decide (tokens, values per token, permutation states) are filled in from the data.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from common.config import require_at_least, require_choice
from common.errors import ConfigError
from rpg.denoiser import NORMS, check_channels
from rpg.mamba2 import check_widths
from rpg.noise_schedule import PREDICTIONS
from rpg.positions import KINDS as POSITION_KINDS

STACKS = ("mamba", "transformer", "lstm", "gmlp")
HEADS = ("diffusion", "mse")
CONDITIONS = ("none", "linear", "gated", "full")
ATTENTIONS = ("corrected", "released")
REFERENCE_GATE = 8  # last tokens that the released class-conditional model lets see the task


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """A generator of networks with ``num_tokens`` tokens of ``dim_per_token`` values.

    ``condition``: ``none``; ``linear``: one linear map of the condition to all tokens; ``gated``: a class vector that
    only some tokens see (by default the last eight, as released); ``full``: a class vector through a small convolution
    that gives every token its own.
    """

    num_tokens: int = 1  # L
    dim_per_token: int = 8192  # D, values per token
    num_states: int = 0  # permutation states; 0: none
    stack: Literal["mamba", "transformer", "lstm", "gmlp"] = "mamba"
    head: Literal["diffusion", "mse"] = "diffusion"  # mse: prototypes are the tokens
    d_model: int = 8192  # M, width of the stack
    post_d_model: int | None = None  # width of the last Mamba block and of the prototypes; null: d_model
    num_layers: int = 2
    d_state: int = 128  # N of Mamba-2
    d_conv: int = 4
    expand: int = 2  # inner width over d_model, of Mamba-2 and the gated MLP
    headdim: int = 64
    ngroups: int = 1
    chunk_size: int = 64  # positions per chunk of the scan; speed only
    num_heads: int = 8  # of the transformer
    head_size: int = 1024
    feedforward: int = 16384
    attention: Literal["corrected", "released"] = "corrected"  # released: unscaled scores, leaky mask
    dropout: float = 0.0  # between LSTM layers
    positions: Literal["none", "1d", "2d"] = "2d"
    trainable_positions: bool = False
    condition: Literal["none", "linear", "gated", "full"] = "none"
    condition_size: int = 0  # numbers in a condition, 10 of a class vector
    d_condition: int = 1  # hidden width of gated and full conditions
    gate: tuple[str, ...] = ()  # name patterns of the tensors that see a gated condition; empty: the last eight tokens
    channels: tuple[int, ...] = (1, 32, 64, 128, 64, 32, 1)  # of the denoiser
    kernel_size: int = 7
    norm: Literal["batch", "group", "none"] = "batch"  # of the denoiser
    diffusion_steps: int = 1000  # T
    beta: tuple[float, float] = (1e-4, 0.02)
    prediction: Literal["noise", "x0", "v"] = "noise"  # what the denoiser puts out; x0 tends to one network
    min_snr_gamma: float | None = None  # weight of the loss over times; null: 1

    def __post_init__(self) -> None:
        for name, choices in (
            ("stack", STACKS), ("head", HEADS), ("condition", CONDITIONS), ("attention", ATTENTIONS),
            ("positions", POSITION_KINDS), ("norm", NORMS), ("prediction", PREDICTIONS),
        ):  # fmt: skip
            require_choice(f"model.{name}", getattr(self, name), choices)
        for name in ("num_tokens", "dim_per_token", "d_model", "num_layers", "d_state", "d_conv", "expand", "headdim",
                     "chunk_size", "d_condition", "num_heads", "head_size", "feedforward"):  # fmt: skip
            require_at_least(f"model.{name}", getattr(self, name), 1)
        for name in ("num_states", "condition_size", "dropout"):
            require_at_least(f"model.{name}", getattr(self, name), 0)
        if self.post_d_model is not None and (self.stack != "mamba" or self.num_layers < 2):
            raise ConfigError(
                f"model.post_d_model={self.post_d_model} is the width of the last of several Mamba blocks; set it to "
                "null, or use model.stack=mamba with model.num_layers=2."
            )
        if self.stack == "mamba":
            check_widths(self.d_model, self.expand, self.headdim, self.ngroups)
            if self.post_d_model is not None:
                check_widths(self.post_d_model, self.expand, self.headdim, self.ngroups)
        if self.head == "diffusion":
            check_channels(self.channels, self.kernel_size)
        elif self.width != self.dim_per_token:
            raise ConfigError(
                f"model.head=mse puts out prototypes as tokens, so their width {self.width} must be "
                f"data.dim_per_token={self.dim_per_token}."
            )
        if self.condition != "none" and self.condition_size < 1:
            raise ConfigError(
                f"model.condition={self.condition} needs checkpoints with conditions; set data.condition=class (or "
                "seed, or file), or model.condition=none."
            )
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ConfigError(f"model.min_snr_gamma={self.min_snr_gamma} must be positive; null switches it off.")
        if len(self.beta) != 2:
            raise ConfigError(f"model.beta={list(self.beta)} must hold two numbers, the first and the last beta.")

    @property
    def width(self) -> int:
        """P, of a prototype."""
        return self.post_d_model or self.d_model


DATA_DECIDES = ("num_tokens", "dim_per_token", "num_states", "condition_size")


def read_generator_config(options: dict[str, Any]) -> GeneratorConfig:
    """The configuration of saved options.

    Raises: ConfigError for an option that does not exist.
    """
    known = {field.name for field in fields(GeneratorConfig)}
    for name in options.keys() - known:
        raise ConfigError(f"model.{name} is no option of a generator; remove it, or update this program.")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    return GeneratorConfig(**values)


def flat_options(config: GeneratorConfig) -> dict[str, Any]:
    """All options, JSON-able; ``read_generator_config`` reads them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
