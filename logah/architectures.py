"""Networks as descriptions: a family and JSON options, from which the network is built with numbers or without.

A description is what architecture sets hold, what graphs are cached by and what a prediction is stored with.
"""

import functools
import importlib
import inspect
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from common.errors import ConfigError, DataError
from logah.architecture_options import COMPLETE, GPT2_VOCABULARY, LLAMA_VOCABULARY, is_image_classifier
from logah.meta_building import build_on_meta
from logah.targets import describe

FAMILIES = ("vit", "gpt2", "llama", "torchvision", "timm", "hf", "module")
LM_FAMILIES = ("gpt2", "llama")
IMAGENET_CLASSES = 1000
DEFAULT_PIXELS = 224
PIXELS_OF = {"inception_v3": 299}  # where torchvision's networks cannot read 224
INITIALISED_ON_REQUEST = ("googlenet", "inception_v3")  # warn unless told whether to initialise
SIZED_PREFIXES = ("vit_", "maxvit_")  # torchvision's networks whose tensors depend on the number of pixels


@dataclass(frozen=True, eq=False)
class Architecture:
    """A network, described.

    Attributes:
        family: who builds it: ``vit`` (torchvision's VisionTransformer), ``gpt2`` and ``llama`` (transformers'
            causal LMs), ``torchvision`` and ``timm`` (by ``name``), ``hf`` (any ``config`` of transformers),
            ``module`` (any importable class or function, ``path`` = package.module:name).
        options: JSON values; see ``vit``, ``gpt2`` and ``llama``. Whatever else is in them goes to the constructor.
    """

    family: Literal["vit", "gpt2", "llama", "torchvision", "timm", "hf", "module"]
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ConfigError(f"target.family={self.family!r} is not known; choose one of {', '.join(FAMILIES)}.")
        complete = COMPLETE.get(self.family, dict)(dict(self.options))
        try:
            complete = json.loads(json.dumps(complete, sort_keys=True))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"target: options of {self.family} must be JSON values ({error}).") from None
        object.__setattr__(self, "options", complete)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Architecture) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        parts = [f"{name}={value}" for name, value in self.options.items() if not isinstance(value, Mapping)]
        if "config" in self.options:
            parts.insert(0, str(self.options["config"].get("model_type")))
        return f"{self.family}({', '.join(parts)})"

    @functools.cached_property
    def key(self) -> str:
        """Equal for equal networks; canonical JSON."""
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))

    @functools.cached_property
    def kind(self) -> Literal["vision", "lm"]:
        if self.family == "hf":
            return "vision" if is_image_classifier(self.options["config"]) else "lm"
        if self.family == "module":
            return self.options.get("kind", "vision")
        return "lm" if self.family in LM_FAMILIES else "vision"

    @property
    def num_classes(self) -> int | None:
        """Of a classifier; None for a language model."""
        if self.kind == "lm":
            return None
        if self.family == "hf":
            return self._hf_config().num_labels
        if self.family == "timm" and "num_classes" not in self.options:
            return self._timm_default("num_classes")
        if self.family == "module":
            return self.options.get("num_classes", self.options.get("arguments", {}).get("num_classes"))
        return self.options.get("num_classes", IMAGENET_CLASSES)

    @property
    def image_size(self) -> int | None:
        """Pixels along one side of the images it reads; None for a language model."""
        if self.kind == "lm":
            return None
        if "image_size" in self.options:
            return self.options["image_size"]
        if self.family == "hf":
            size = getattr(self._hf_config(), "image_size", DEFAULT_PIXELS)
            return size if isinstance(size, int) else size[0]
        if self.family == "timm":
            return self._timm_default("input_size")[-1]
        return PIXELS_OF.get(self.options.get("name"), DEFAULT_PIXELS)

    @property
    def vocab_size(self) -> int | None:
        """Of a language model; None for a classifier."""
        return self._hf_config().get_text_config().vocab_size if self.kind == "lm" and self._has_config else None

    @property
    def block_size(self) -> int | None:
        """Longest sequence that a language model reads; None for a classifier."""
        if self.kind != "lm" or not self._has_config:
            return None
        return getattr(self._hf_config().get_text_config(), "max_position_embeddings", None)

    @property
    def _has_config(self) -> bool:
        return self.family in ("gpt2", "llama", "hf")

    def hf_config(self) -> Any:
        """A fresh configuration of transformers, for the families that have one.

        Raises: ConfigError for the others.
        """
        if not self._has_config:
            raise ConfigError(f"target: {self} is not a network of transformers and has no configuration of its own.")
        return self._hf_config()

    def build(self, *, attention: Literal["eager", "sdpa"] | None = None) -> nn.Module:
        """The network, initialised as its library does, in training mode, on the default device.

        Args:
            attention: implementation in networks of transformers; None: ``eager``, the only one whose dropout and
                softmax are operations of their own, if the options name no ``attn_implementation``.

        Raises: ConfigError for options that its constructor refuses.
        """
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=FutureWarning)
                return self._build(attention)
        except (TypeError, ValueError, AssertionError, KeyError, AttributeError, ImportError) as error:
            if isinstance(error, ConfigError):
                raise
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise ConfigError(f"target: {self} cannot be built: {reason}") from error

    def build_meta(self, *, attention: Literal["eager", "sdpa"] | None = None) -> nn.Module:
        """The network on ``meta``: no memory, no random numbers, tied weights tied."""
        return build_on_meta(lambda: self.build(attention=attention))

    def to_json(self) -> dict[str, Any]:
        return {"family": self.family, "options": dict(self.options)}

    @classmethod
    def from_json(cls, value: object, *, where: str = "architecture") -> "Architecture":
        """The inverse of ``to_json``.

        Raises: DataError for anything else; ``where`` names the file. Code to import is not taken from files.
        """
        if not isinstance(value, Mapping) or value.keys() != {"family", "options"}:
            raise DataError(f'{where} is no architecture: it must be {{"family": ..., "options": {{...}}}}.')
        if value["family"] == "module":
            raise DataError(f"{where} names code to import (family module), which is not taken from a file.")
        if not isinstance(value["options"], Mapping):
            raise DataError(f"{where}: options of the architecture must be a mapping, not {value['options']!r}.")
        try:
            return cls(value["family"], value["options"])
        except ConfigError as error:
            raise DataError(f"{where}: {error}") from None

    # -------------------------------------------------------------------------------------------------- by family

    def _build(self, attention: str | None) -> nn.Module:
        options = dict(self.options)
        if self.family == "vit":
            from torchvision.models import VisionTransformer

            return VisionTransformer(**options)
        if self.family == "torchvision":
            return self._build_torchvision(options)
        if self.family == "timm":
            import timm

            size = options.pop("image_size", None)
            if size is not None and self._timm_default("fixed_input_size"):  # others read any; see ``image_size``
                options["img_size"] = size
            return timm.create_model(options.pop("name"), pretrained=False, **options)
        if self.family == "module":
            return _import(options["path"])(**options.get("arguments", {}))
        return self._build_transformers(attention)

    def _build_torchvision(self, options: dict[str, Any]) -> nn.Module:
        import torchvision

        name = options.pop("name")
        if name in INITIALISED_ON_REQUEST:
            options.setdefault("init_weights", True)
        if not name.startswith(SIZED_PREFIXES):
            options.pop("image_size", None)  # convolutions read any; it says what to trace and evaluate with
        elif name.startswith("maxvit_") and "image_size" in options:
            options["input_size"] = (options.pop("image_size"),) * 2
        return torchvision.models.get_model(name, weights=None, **options)

    def _build_transformers(self, attention: str | None) -> nn.Module:
        import transformers

        config = self._hf_config()
        chosen = attention or self.options.get("attn_implementation") or "eager"
        if self.kind == "lm":
            automatic = transformers.AutoModelForCausalLM
        else:
            automatic = transformers.AutoModelForImageClassification
        return automatic.from_config(config, attn_implementation=chosen, dtype=torch.float32)

    def _hf_config(self) -> Any:
        import transformers

        options = {name: value for name, value in self.options.items() if name != "attn_implementation"}
        if self.family == "hf":
            options = dict(options["config"])
            for name in ("auto_map", "quantization_config", "attn_implementation", "_attn_implementation"):
                options.pop(name, None)
        else:
            options["model_type"] = self.family
        model_type = options.pop("model_type")
        try:
            return transformers.AutoConfig.for_model(model_type, **options)
        except Exception as error:  # transformers checks values with validators of several libraries
            raise ConfigError(f"target: a configuration of transformers refuses these options: {error}") from None

    def _timm_default(self, name: str) -> Any:
        import timm

        return getattr(timm.get_pretrained_cfg(self.options["name"]), name)


# --------------------------------------------------------------------------------------------------- the families


def vit(
    patch_size: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int,
    mlp_dim: int | None = None,
    num_classes: int = 10,
    image_size: int = 32,
    dropout: float = 0.0,
    **more: Any,
) -> Architecture:
    """torchvision's VisionTransformer.

    Args:
        mlp_dim: None: four times ``hidden_dim``.
        more: further options of its constructor.

    Raises: ConfigError where patches do not fill the image or heads the width.
    """
    options = {
        "patch_size": patch_size, "num_layers": num_layers, "num_heads": num_heads, "hidden_dim": hidden_dim,
        "mlp_dim": mlp_dim, "num_classes": num_classes, "image_size": image_size, "dropout": dropout,
    }  # fmt: skip
    return Architecture("vit", options | more)


def gpt2(
    n_embd: int,
    n_layer: int,
    n_head: int,
    vocab_size: int = GPT2_VOCABULARY,
    n_positions: int = 1024,
    tie_word_embeddings: bool = False,
    **more: Any,
) -> Architecture:
    """transformers' GPT2LMHeadModel; ``more``: further values of its configuration (dropout rates, ...)."""
    options = {
        "n_embd": n_embd, "n_layer": n_layer, "n_head": n_head, "vocab_size": vocab_size, "n_positions": n_positions,
        "tie_word_embeddings": tie_word_embeddings,
    }  # fmt: skip
    return Architecture("gpt2", options | more)


def llama(
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int | None = None,
    intermediate_size: int | None = None,
    vocab_size: int = LLAMA_VOCABULARY,
    tie_word_embeddings: bool = False,
    **more: Any,
) -> Architecture:
    """transformers' LlamaForCausalLM.

    Args:
        num_key_value_heads: None: as many as heads.
        intermediate_size: None: four times ``hidden_size``.
        more: further values of its configuration.
    """
    options = {
        "hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers, "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads, "intermediate_size": intermediate_size, "vocab_size": vocab_size,
        "tie_word_embeddings": tie_word_embeddings,
    }  # fmt: skip
    return Architecture("llama", options | more)


def resolve_target(target: "str | Mapping[str, Any] | Architecture") -> Architecture:
    """The network that ``target`` names: see ``logah.targets``.

    Raises: ConfigError or DataError, naming what cannot be resolved.
    """
    if isinstance(target, Architecture):
        return target
    return Architecture(*describe(target))


def _import(path: str) -> Any:
    """The class or function at ``package.module:name``."""
    module_name, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"target=module:{path} cannot be imported: {error}") from None
    if not (inspect.isclass(found) and issubclass(found, nn.Module)) and not inspect.isfunction(found):
        raise ConfigError(f"target=module:{path} is neither a class of networks nor a function that returns one.")
    return found
