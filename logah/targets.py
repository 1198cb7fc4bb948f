"""What a user may call a network: names of presets and of other libraries' networks, files, mappings.

    vit_s_cifar, vit_b_imagenet   ViT-S/B/L with patches of 2 on 32 x 32 pixels, or of 16 on 224 x 224
    gpt2, gpt2-medium, gpt2-large, gpt2-xl      with a head of their own, as LoGAH trains them; tie=true: OpenAI's
    llama-small, llama-medium, llama-large      the three Llama-like sizes of LoGAH (182 M, 451 M, 748 M)
    llama-8b                                    Llama 3.1 8B
    resnet50, torchvision:vit_l_16              every classifier of torchvision
    timm:vit_small_patch16_224                  every network of timm
    DIR, FILE.json                              a configuration of transformers, or a description as below
    {family: vit, patch_size: 4, ...}           the options of ``architectures``

``NAME?key:value?key:value`` changes options of a named one: ``gpt2-large?tie:true``, ``resnet50?num_classes:10``
(``=`` and ``&`` do as well, where no shell and no Hydra reads them first).
"""

import difflib
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import ConfigError, DataError

Description = tuple[str, dict[str, Any]]

CIFAR = {"image_size": 32, "patch_size": 2, "num_classes": 100}
IMAGENET = {"image_size": 224, "patch_size": 16, "num_classes": 1000}
VIT_SIZES = {
    "vit_s": {"num_layers": 12, "num_heads": 6, "hidden_dim": 384},
    "vit_b": {"num_layers": 12, "num_heads": 12, "hidden_dim": 768},
    "vit_l": {"num_layers": 24, "num_heads": 16, "hidden_dim": 1024},
}
GPT2_SIZES = {
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
LLAMA_SIZES = {
    "llama-small": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8},
    "llama-medium": {
        "hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 8,
    },
    "llama-large": {"hidden_size": 1280, "num_hidden_layers": 16, "num_attention_heads": 20},
    "llama-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 131072,
    },
}  # fmt: skip
PRESETS: dict[str, Description] = {
    **{f"{name}_cifar": ("vit", size | CIFAR) for name, size in VIT_SIZES.items()},
    **{f"{name}_imagenet": ("vit", size | IMAGENET) for name, size in VIT_SIZES.items()},
    **{name: ("gpt2", size) for name, size in GPT2_SIZES.items()},
    **{name: ("llama", size) for name, size in LLAMA_SIZES.items()},
}
SHORT_OPTIONS = {"tie": "tie_word_embeddings"}
CONFIG_FILES = ("architecture.json", "config.json")


@functools.cache
def torchvision_classifiers() -> tuple[str, ...]:
    """Names of all classifiers of torchvision, sorted."""
    import torchvision

    return tuple(torchvision.models.list_models(module=torchvision.models))


def describe(target: str | Mapping[str, Any]) -> Description:
    """Family and options of the network that ``target`` names (see the module).

    Raises: ConfigError for a name of nothing known, DataError for a file that is no description.
    """
    if isinstance(target, Mapping):
        return _from_mapping(dict(target))
    name, _, query = str(target).strip().partition("?")
    family, options = _from_name(name)
    for change in filter(None, re.split("[?&]", query)):
        key, separator, text = re.match(r"([^:=]*)([:=]?)(.*)", change).groups()
        if not (key and separator):
            raise ConfigError(f"target={target!r}: {change!r} is no option; write NAME?key:value, e.g. gpt2?tie:true.")
        options[SHORT_OPTIONS.get(key, key)] = _value(text)
    return family, options


def _from_mapping(target: dict[str, Any]) -> Description:
    if "name" in target and "family" not in target:
        family, options = describe(target.pop("name"))
        return family, options | {SHORT_OPTIONS.get(key, key): value for key, value in target.items()}
    if "family" in target:
        options = target.get("options")
        if isinstance(options, Mapping) and len(target) == 2:
            return str(target["family"]), dict(options)
        return str(target.pop("family")), {SHORT_OPTIONS.get(key, key): value for key, value in target.items()}
    if "model_type" in target:
        return "hf", {"config": target}
    raise ConfigError(
        f"target={target} describes no network: it needs a family (vit, gpt2, llama, torchvision, timm, hf), a name, "
        "or the model_type of a transformers configuration."
    )


def _from_name(name: str) -> Description:
    library, colon, rest = name.partition(":")
    if colon and library in ("torchvision", "timm"):
        return library, {"name": rest}
    if colon and library == "module":
        return "module", {"path": rest}
    for known, (family, options) in PRESETS.items():
        if name.lower().replace("-", "_") == known.replace("-", "_"):
            return family, dict(options)
    if name in torchvision_classifiers():
        return "torchvision", {"name": name}
    path = Path(name)
    if path.exists():
        return _from_mapping(_read(path))
    known_names = [*PRESETS, *torchvision_classifiers()]
    near = difflib.get_close_matches(name, known_names, n=3, cutoff=0.6)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    raise ConfigError(
        f"target={name!r} is neither a preset ({', '.join(PRESETS)}), nor a classifier of torchvision, nor a file or "
        f"folder that exists, nor timm:NAME.{hint}"
    )


def _read(path: Path) -> dict[str, Any]:
    """The description in a JSON file, or in the folder that a prediction or transformers wrote."""
    if path.is_dir():
        found = [path / name for name in CONFIG_FILES if (path / name).is_file()]
        if not found:
            raise DataError(f"target={path} is a folder without {' or '.join(CONFIG_FILES)}; name another target.")
        path = found[0]
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"target={path} cannot be read as JSON ({error}); name the file of a configuration.") from None
    if not isinstance(described, dict) or not {"family", "model_type", "name"} & described.keys():
        raise DataError(
            f"target={path} describes no network: it has neither a family of ours nor the model_type of transformers."
        )
    if described.get("family") == "module":
        raise DataError(f"target={path} names code to run (family module), which is not taken from a file.")
    return described


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
