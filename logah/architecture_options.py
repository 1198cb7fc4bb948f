"""Options of each family of networks: defaults, and checks that name the option.

Raised before a network is built, because the constructors' own complaints name no option of ours.
"""

from collections.abc import Mapping
from typing import Any

from common.errors import ConfigError
from logah.targets import torchvision_classifiers

GPT2_VOCABULARY, LLAMA_VOCABULARY = 50257, 128256
VIT_DEFAULTS = {"num_classes": 10, "image_size": 32, "dropout": 0.0}
VIT_SIZES = ("patch_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim", "num_classes", "image_size")


def _whole_number(options: Mapping[str, Any], name: str, family: str) -> int:
    value = options.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"target: {family} needs a whole number of at least 1 for {name}, not {value!r}.")
    return value


def _require_multiple(options: Mapping[str, Any], name: str, of: str, family: str) -> None:
    if _whole_number(options, name, family) % _whole_number(options, of, family):
        raise ConfigError(f"target: {family} needs {name}={options[name]} to be a multiple of {of}={options[of]}.")


def _complete_vit(options: dict[str, Any]) -> dict[str, Any]:
    options = VIT_DEFAULTS | options
    if options.get("mlp_dim") is None:
        options["mlp_dim"] = 4 * _whole_number(options, "hidden_dim", "vit")
    for name in VIT_SIZES:
        _whole_number(options, name, "vit")
    _require_multiple(options, "image_size", "patch_size", "vit")
    _require_multiple(options, "hidden_dim", "num_heads", "vit")
    return options


def _complete_gpt2(options: dict[str, Any]) -> dict[str, Any]:
    options = {"vocab_size": GPT2_VOCABULARY, "n_positions": 1024, "tie_word_embeddings": False} | options
    for name in ("n_layer", "vocab_size", "n_positions"):
        _whole_number(options, name, "gpt2")
    _require_multiple(options, "n_embd", "n_head", "gpt2")
    return options | _special_tokens(options, GPT2_VOCABULARY, 50256, 50256)


def _complete_llama(options: dict[str, Any]) -> dict[str, Any]:
    options = {"vocab_size": LLAMA_VOCABULARY, "tie_word_embeddings": False} | options
    if options.get("intermediate_size") is None:
        options["intermediate_size"] = 4 * _whole_number(options, "hidden_size", "llama")
    if options.get("num_key_value_heads") is None:
        options["num_key_value_heads"] = _whole_number(options, "num_attention_heads", "llama")
    for name in ("num_hidden_layers", "vocab_size", "intermediate_size"):
        _whole_number(options, name, "llama")
    _require_multiple(options, "hidden_size", "num_attention_heads", "llama")
    _require_multiple(options, "num_attention_heads", "num_key_value_heads", "llama")
    return options | _special_tokens(options, LLAMA_VOCABULARY, 128000, 128001)


def _special_tokens(options: Mapping[str, Any], vocabulary: int, first: int, last: int) -> dict[str, int | None]:
    """Ids of the tokens around a text: the published ones in the published vocabulary, none in another."""
    own = options["vocab_size"] == vocabulary
    published = {"bos_token_id": first if own else None, "eos_token_id": last if own else None}
    return {name: options.get(name, value) for name, value in published.items()}


def _complete_torchvision(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("name") not in torchvision_classifiers():
        raise ConfigError(
            f"target=torchvision:{options.get('name')} is not a classifier of torchvision; choose one of "
            f"{', '.join(torchvision_classifiers())}."
        )
    return options


def _complete_timm(options: dict[str, Any]) -> dict[str, Any]:
    import timm

    if not timm.is_model(str(options.get("name"))):
        near = timm.list_models(f"*{str(options.get('name')).split('_')[0]}*")[:8]
        hint = f" Some that it knows: {', '.join(near)}." if near else ""
        raise ConfigError(f"target=timm:{options.get('name')} is not a network of timm.{hint}")
    return options


def _complete_hf(options: dict[str, Any]) -> dict[str, Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = options.get("config")
    model_type = config.get("model_type") if isinstance(config, Mapping) else None
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"target: model_type={model_type!r} is no model of the installed transformers; give the config.json of one "
            "that it knows."
        )
    is_image_classifier(config)
    return options


def _complete_module(options: dict[str, Any]) -> dict[str, Any]:
    if str(options.get("path")).count(":") != 1:
        raise ConfigError(f"target=module:{options.get('path')} must be module:PACKAGE.MODULE:NAME.")
    return options


COMPLETE = {
    "vit": _complete_vit,
    "gpt2": _complete_gpt2,
    "llama": _complete_llama,
    "torchvision": _complete_torchvision,
    "timm": _complete_timm,
    "hf": _complete_hf,
    "module": _complete_module,
}
"""By family: options with those left out, checked as far as that is possible without building the network."""


def is_image_classifier(config: Mapping[str, Any]) -> bool:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    )

    model_type = config["model_type"]
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return False
    if model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return True
    raise ConfigError(
        f"target: {model_type} of transformers is neither a causal language model nor an image classifier."
    )
