"""Networks by name: two small CNNs, all of timm and torchvision, and any class that can be imported.

====================  =================================================================================================
``cnn_small``         three convolutions and two linear layers for 32 x 32 images, 2,864 parameters
``cnn_medium``        the same with wider layers, 10,853 parameters
``digit_cnn``         the network of ``rpg.zoo.digits``, for 8 x 8 images
``digit_task_mlp``    the network of ``rpg.zoo.digit_tasks``
``timm:NAME``         any network of timm, e.g. ``timm:vit_tiny_patch16_224``
``torchvision:NAME``  any classifier of torchvision, e.g. ``torchvision:mobilenet_v3_small``
``MODULE:CLASS``      a class of yours; ``network.options`` are its arguments
====================  =================================================================================================

Dimensions: B images, C classes, H and W pixels.
"""

import fnmatch
import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import require_at_least, require_choice
from common.conversion import nearest
from common.errors import ConfigError
from common.seeding import derive_seed
from rpg.checkpoint_files import read_checkpoint
from rpg.zoo.digits import DigitCNN

logger = logging.getLogger(__name__)

State = dict[str, Tensor]
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True, kw_only=True)
class NetworkSection:
    """Options ``recipe.network.*``."""

    name: str = "cnn_small"  # see the module's table
    num_classes: int = 10
    pretrained: bool = False  # start from the library's published weights (downloads them)
    weights: str | None = None  # start from this file instead; its classifier is left out if it has other classes
    head: Literal["linear", "mlp"] = "linear"  # mlp: Linear, SiLU, Linear without bias, as of the task networks
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of the network
    freeze_norms: bool = False  # scales and shifts of batch normalisation keep their first values
    trainable: list[str] = field(default_factory=list)  # patterns of the parameters that are trained; empty: all

    def __post_init__(self) -> None:
        require_choice("network.head", self.head, ("linear", "mlp"))
        require_at_least("network.num_classes", self.num_classes, 2)
        if self.pretrained and self.weights is not None:
            raise ConfigError(
                f"network.pretrained=true and network.weights={self.weights} exclude each other; set one."
            )


class CNNSmall(nn.Module):
    """Three convolutions, two linear layers; images are resized to 28 x 28. 2,864 parameters with ten classes."""

    size = 28

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.module = nn.Sequential(
            nn.Conv2d(3, 8, 5), nn.MaxPool2d(2), nn.LeakyReLU(),
            nn.Conv2d(8, 6, 5), nn.MaxPool2d(2), nn.LeakyReLU(),
            nn.Conv2d(6, 4, 2), nn.LeakyReLU(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(36, 20), nn.LeakyReLU(), nn.Linear(20, num_classes))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Logits (B, C)."""
        if images_B3HW.shape[-1] != self.size:
            images_B3HW = F.interpolate(images_B3HW, (self.size, self.size), mode="bilinear", antialias=True)
        return self.head(self.module(images_B3HW).flatten(1))


class CNNMedium(nn.Module):
    """Three 3 x 3 convolutions and two linear layers for 32 x 32 images; 10,853 parameters with ten classes."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.module = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.MaxPool2d(2), nn.LeakyReLU(),
            nn.Conv2d(16, 32, 3), nn.MaxPool2d(2), nn.LeakyReLU(),
            nn.Conv2d(32, 15, 3), nn.MaxPool2d(2), nn.LeakyReLU(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(60, 20), nn.LeakyReLU(), nn.Linear(20, num_classes))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Logits (B, C)."""
        return self.head(self.module(images_B3HW).flatten(1))


class DigitTaskMLP(nn.Module):
    """A network of ``rpg.zoo.digit_tasks`` on its own: three linear layers on the 64 pixels of a digit."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        sizes = (64, 32, 32, num_classes)
        for layer, (columns, rows) in enumerate(zip(sizes, sizes[1:]), start=1):
            bound = columns**-0.5
            self.register_parameter(f"w{layer}", nn.Parameter(torch.empty(rows, columns).uniform_(-bound, bound)))
            self.register_parameter(f"b{layer}", nn.Parameter(torch.empty(rows).uniform_(-bound, bound)))

    def forward(self, images_B1HW: Tensor) -> Tensor:
        """Logits (B, C)."""
        hidden = F.relu(F.linear(images_B1HW.flatten(1), self.w1, self.b1))
        hidden = F.relu(F.linear(hidden, self.w2, self.b2))
        return F.linear(hidden, self.w3, self.b3)


OWN = {"cnn_small": CNNSmall, "cnn_medium": CNNMedium, "digit_task_mlp": DigitTaskMLP}


def build_network(section: NetworkSection, seed: int = 0) -> nn.Module:
    """The network with its initial weights, on the CPU, in float32.

    Args:
        seed: of the weights that are neither pretrained nor read from a file.

    Raises: ConfigError for an unknown name; CheckpointError for a weight file of another network.
    """
    # Libraries draw initial weights from the global generator; its state comes back afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "network"))
        network = _build(section)
        if section.head == "mlp":
            _replace_head(network, section.num_classes)
        if section.weights is not None:
            load_initial_weights(network, read_checkpoint(section.weights), section.weights)
    set_trainable(network, section)
    return network


def skeleton(section: NetworkSection) -> nn.Module:
    """The network on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        network = _build(NetworkSection(**{**vars(section), "pretrained": False}))
        if section.head == "mlp":
            _replace_head(network, section.num_classes)
    return network


def _build(section: NetworkSection) -> nn.Module:
    library, _, name = section.name.partition(":")
    if not name:
        if library == "digit_cnn":
            return DigitCNN()
        if library not in OWN:
            near = nearest(library, [*OWN, "digit_cnn"])
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"network.name={library!r} is not known; choose {', '.join(OWN)}, digit_cnn, timm:NAME, "
                f"torchvision:NAME or MODULE:CLASS.{hint}"
            )
        return OWN[library](num_classes=section.num_classes)
    if library == "timm":
        return _build_timm(name, section)
    if library == "torchvision":
        return _build_torchvision(name, section)
    try:
        return getattr(importlib.import_module(library), name)(**section.options)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigError(f"network.name={section.name}: {error}; give MODULE:CLASS of a class on the path.") from None


def _build_timm(name: str, section: NetworkSection) -> nn.Module:
    import timm

    if not timm.is_model(name.split(".")[0]):
        near = nearest(name, timm.list_models(), count=3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise ConfigError(f"network.name=timm:{name}: timm {timm.__version__} has no such network.{hint}")
    try:
        return timm.create_model(
            name, pretrained=section.pretrained, num_classes=section.num_classes, **section.options
        )
    except OSError as error:
        raise _no_download(section.name, error) from None


def _build_torchvision(name: str, section: NetworkSection) -> nn.Module:
    from torchvision import models

    known = models.list_models(models)
    if name not in known:
        near = nearest(name, known, count=3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise ConfigError(f"network.name=torchvision:{name}: torchvision has no such network.{hint}")
    network = models.get_model(name, num_classes=section.num_classes, **section.options)
    if section.pretrained:
        try:
            published = models.get_model_weights(name).DEFAULT.get_state_dict(progress=False)
        except OSError as error:
            raise _no_download(section.name, error) from None
        load_initial_weights(network, published, section.name)
    return network


def _no_download(name: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"network.pretrained=true: the weights of {name} cannot be downloaded ({str(error).splitlines()[0]}). Download "
        "them elsewhere and set network.pretrained=false network.weights=FILE, or train from scratch."
    )


# ----------------------------------------------------------------------------------------------------- heads, weights


def head_name(network: nn.Module) -> str:
    """Name of the classifier: the layer that a head-only epoch trains.

    Raises: ConfigError if the network has none.
    """
    for name, child in reversed(list(network.named_children())):  # a head of several layers counts as one
        if name in ("head", "classifier", "fc") and any(isinstance(part, nn.Linear) for part in child.modules()):
            return name
    linear = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise ConfigError(f"{type(network).__name__} has no linear layer that could be its head; set head_epochs=0.")
    return linear[-1]


def _replace_head(network: nn.Module, num_classes: int) -> None:
    """Puts a linear layer, SiLU and a linear layer without bias in the place of the last linear layer."""
    name = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)][-1]
    width = network.get_submodule(name).in_features
    parent, _, leaf = name.rpartition(".")
    mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, num_classes, bias=False))
    setattr(network.get_submodule(parent) if parent else network, leaf, mlp)


def load_initial_weights(network: nn.Module, state: State, source: str) -> None:
    """Copies ``state`` into ``network``; entries of the head may be missing or have other shapes.

    Raises: ConfigError for anything else that is missing, unexpected or of another shape.
    """
    own, head = network.state_dict(), head_name(network)
    fits = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    left = [name for name in {**own, **state} if name not in fits]
    wrong = [key for key in left if not key.startswith(f"{head}.")]
    if wrong:
        shapes = [tuple(part[wrong[0]].shape) if wrong[0] in part else "missing" for part in (own, state)]
        raise ConfigError(
            f"network.weights={source} does not fit {type(network).__name__}: {wrong[0]} is {shapes[0]} in the network "
            f"and {shapes[1]} in the file ({len(wrong)} such entries). Give weights of the same architecture."
        )
    if left:
        logger.info("%s: the head (%s) keeps its random weights", source, head)
    network.load_state_dict(fits, strict=False)


def set_trainable(network: nn.Module, section: NetworkSection) -> None:
    """Marks what is trained: all parameters, those of ``section.trainable``, without frozen norms.

    Raises: ConfigError if a pattern of ``section.trainable`` fits nothing.
    """
    names = [name for name, _ in network.named_parameters()]
    chosen = set(matching(names, section.trainable, "network.trainable")) if section.trainable else set(names)
    if section.freeze_norms:
        chosen -= {
            f"{module_name}.{leaf}"
            for module_name, module in network.named_modules()
            if isinstance(module, _NORMS)
            for leaf in ("weight", "bias")
        }
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in chosen)


def matching(names: Sequence[str], patterns: Sequence[str], option: str) -> list[str]:
    """The names that fit one of the shell-style ``patterns``, in their order.

    Raises: ConfigError for a pattern that fits none.
    """
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = nearest(pattern, names)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{option}={pattern!r} fits no name of the network.{hint}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
