"""Options of a hypernetwork: what ``config.json`` of a checkpoint holds and ``model.*`` of a training run sets."""

from dataclasses import dataclass
from typing import Any, Literal

from common.config import require_at_least, require_choice
from common.errors import ConfigError

VARIANTS = ("vision", "llm")
DECODERS = ("lowrank", "dense", "lowrank_v2", "ghn2")
NORMALISATIONS = ("fan_in", "unit_std", "none")
ATTENTIONS = ("explicit", "as_is")
GRAPH_VERSIONS = ("reference", "v2")
DEFAULT_SPATIAL = 16


@dataclass(frozen=True, kw_only=True)
class HyperNetworkConfig:
    """Sizes and rules of a hypernetwork.

    Attributes of its inputs (``graph_version``, ``attention``, ``ve_cutoff``) are kept with the weights: a prediction
    from graphs traced otherwise is refused.
    """

    variant: Literal["vision", "llm"] = "vision"  # node types and sizes it can embed
    decoder: Literal["lowrank", "dense", "lowrank_v2", "ghn2"] = "lowrank"  # LoGAH's, GHN-3's, ours, GHN-2's
    hid: int = 64  # d: width of the encoder
    layers: int = 3
    heads: int = 8
    layernorm: bool = True  # one more after the last layer
    virtual_edges: bool = True  # distances as edge features; off only in the earliest checkpoints
    lora_r: int = 32  # r: rank of the decoded matrices
    max_ck_lora: int = 32768  # K: rows of a factor, at least the largest outputs x kernel height
    max_shape: tuple[int, int, int, int] = (2048, 2048, 16, 16)  # decoded sizes; wider targets are tiled
    num_classes: int = 10  # of the data it was trained on
    use_1d_decoder: bool = False  # low-rank decoders only: a decoder of its own for vectors
    normalisation: Literal["auto", "fan_in", "unit_std", "none"] = "auto"  # auto: fan_in (vision), unit_std (llm)
    residual_scale: bool = False  # unit_std: c_proj and o_proj divided by sqrt(2 layers) of the target
    initializer_range: float = 0.02  # unit_std: standard deviation where the target's own config names none
    class_token_noise: float = 0.0  # deviation of the class token's row of a position table; 0: a zero row
    graph_version: Literal["reference", "v2"] = "reference"
    attention: Literal["explicit", "as_is"] = "explicit"  # whether a softmax is visible in the graph
    ve_cutoff: int = 50  # longest path that is a virtual edge; 1: none

    def __post_init__(self) -> None:
        require_choice("model.variant", self.variant, VARIANTS)
        require_choice("model.decoder", self.decoder, DECODERS)
        require_choice("model.normalisation", self.normalisation, ("auto", *NORMALISATIONS))
        require_choice("model.graph_version", self.graph_version, GRAPH_VERSIONS)
        require_choice("model.attention", self.attention, ATTENTIONS)
        for name in ("hid", "layers", "heads", "lora_r", "max_ck_lora", "num_classes", "ve_cutoff"):
            require_at_least(f"model.{name}", getattr(self, name), 1)
        if self.hid % self.heads or self.hid % 4:
            raise ConfigError(
                f"model.hid={self.hid} must be a multiple of model.heads={self.heads} (width of a head) and of 4 "
                "(the shape embedding has four parts); for example model.hid=64 model.heads=8."
            )
        object.__setattr__(self, "max_shape", parse_max_shape(self.max_shape))
        if self.class_token_noise < 0:
            raise ConfigError(
                f"model.class_token_noise={self.class_token_noise} is a deviation and cannot be negative."
            )

    @property
    def rule(self) -> str:
        """``normalisation`` with ``auto`` decided."""
        if self.normalisation != "auto":
            return self.normalisation
        return "fan_in" if self.variant == "vision" else "unit_std"


def parse_max_shape(value: Any) -> tuple[int, int, int, int]:
    """``c`` -> (c, c, 16, 16), ``o,i`` -> (o, i, 16, 16), or four sizes.

    Raises: ConfigError for another count or a size below 1.
    """
    parts = value.replace(",", " ").split() if isinstance(value, str) else value
    parts = [parts] if isinstance(parts, int) else list(parts)
    try:
        sizes = [int(part) for part in parts]
    except ValueError:
        sizes = []
    if len(sizes) == 1:
        sizes = sizes * 2
    if len(sizes) == 2:
        sizes += [DEFAULT_SPATIAL] * 2
    if len(sizes) != 4 or min(sizes) < 1:
        raise ConfigError(
            f"model.max_shape={value!r} must be 1, 2 or 4 sizes of at least 1: c, [outputs,inputs] or "
            "[outputs,inputs,height,width]; for example model.max_shape=2048."
        )
    return tuple(sizes)
