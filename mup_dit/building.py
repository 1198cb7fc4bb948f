"""From an options section to a network with its parametrisation, and back from a saved description."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch._guards import detect_fake_mode

from common.config import require_at_least, require_choice
from common.conversion import from_config
from common.errors import ConfigError
from mup_dit.base_shapes import read_base_shapes
from mup_dit.dit import DiT, DiTConfig
from mup_dit.mmdit import MMDiT, MMDiTConfig
from mup_dit.parametrization import (
    Scaling,
    apply_table,
    find_base_shapes,
    initialize,
    plain_table,
    scaling_table,
)
from mup_dit.pixart import PixArt, PixArtConfig

Network = DiT | PixArt | MMDiT
NetworkConfig = DiTConfig | PixArtConfig | MMDiTConfig
FAMILIES: dict[str, tuple[type[Network], type[NetworkConfig]]] = {
    "dit": (DiT, DiTConfig),
    "pixart": (PixArt, PixArtConfig),
    "mmdit": (MMDiT, MMDiTConfig),
}
OWN_OPTIONS = ("family", "parametrization", "base_heads", "base_shapes")
PARAMETRIZATIONS = ("mup", "mup_init", "sp")
BASE_HEADS = 4  # base width of all presets, in heads


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A network and its parametrisation.

    ``mup``: muP. ``sp``: the standard parametrisation. ``mup_init``: muP's init with every other multiplier 1, the
    control that separates muP's other init from its scaling.
    """

    family: Literal["dit", "pixart", "mmdit"] = "dit"
    parametrization: Literal["mup", "mup_init", "sp"] = "mup"
    network: NetworkConfig
    base_heads: int = BASE_HEADS  # base width = base_heads x this network's head size, at its own depth
    base_shapes: str | None = None  # a .bsh file instead

    def __post_init__(self) -> None:
        require_choice("model.family", self.family, tuple(FAMILIES))
        require_choice("model.parametrization", self.parametrization, PARAMETRIZATIONS)
        require_at_least("model.base_heads", self.base_heads, 1)
        expected = FAMILIES[self.family][1]
        if type(self.network) is not expected:
            raise ConfigError(
                f"model.family={self.family} needs a {expected.__name__}, not {type(self.network).__name__}."
            )

    @property
    def base_width(self) -> int:
        return self.base_heads * self.network.head_size

    def at_heads(self, heads: int) -> "ModelConfig":
        """The same network at another width: ``heads`` heads of the same size."""
        width = heads * self.network.head_size
        return replace(self, network=replace(self.network, hidden_size=width, num_heads=heads))


def read_model_config(options: Mapping[str, Any]) -> ModelConfig:
    """The configuration from flat options (family, parametrization, base_heads, base_shapes and the network's own).

    Raises: ConfigError for an option that the family does not have.
    """
    given = dict(options)
    own = {name: given.pop(name) for name in OWN_OPTIONS if name in given}
    family = own.get("family", "dit")
    require_choice("model.family", family, tuple(FAMILIES))
    network = from_config(FAMILIES[family][1], given, "model")
    return from_config(ModelConfig, {**own, "network": network}, "model")


def flat_options(config: ModelConfig) -> dict[str, Any]:
    """The inverse of ``read_model_config``: what config.json holds."""
    own = {name: getattr(config, name) for name in OWN_OPTIONS}
    return {**own, **asdict(config.network)}


def build_skeleton(config: ModelConfig, device: str = "meta") -> Network:
    """The network with its table but without weights (on ``meta``: without memory)."""
    with torch.device(device):
        model = FAMILIES[config.family][0](config.network)
    apply_table(model, model_table(model, config))
    return model


def build_model(config: ModelConfig, generator: torch.Generator | None = None) -> Network:
    """A freshly initialised float32 network on torch's default device; ``model.scalings`` holds its table.

    Args:
        generator: of the weights; None: torch's global one.

    Raises: ConfigError for base shapes of another model.
    """
    device = torch.get_default_device()
    if device.type == "meta" or detect_fake_mode() is not None:  # for estimates: shapes without values
        return build_skeleton(config, str(device))
    model = build_skeleton(config).to_empty(device=device)
    initialize(model, tuple(model.scalings.values()), generator)
    return model


def model_table(model: Network, config: ModelConfig) -> tuple[Scaling, ...]:
    """The parametrisation of ``model``, from two narrow models on the meta device or from ``config.base_shapes``."""
    law = model.init_law(config.parametrization)
    if config.parametrization == "sp":
        return scaling_table(model, None, law)
    shapes = read_base_shapes(config.base_shapes) if config.base_shapes else compute_base_shapes(config)
    return scaling_table(model, shapes, law, scale_updates=config.parametrization == "mup")


def compute_base_shapes(config: ModelConfig) -> dict[str, tuple[int | None, ...]]:
    """Base sizes at ``base_heads`` heads, width axes found against a model one head wider; at the network's depth."""
    kind = FAMILIES[config.family][0]
    with torch.device("meta"):
        base, delta = (
            kind(replace(config, base_shapes=None).at_heads(config.base_heads + more).network) for more in (0, 1)
        )
    return find_base_shapes(base, delta)


def describe(model: nn.Module) -> list[dict]:
    """The table of a built model as JSON can hold it."""
    return plain_table(model.scalings or {})
