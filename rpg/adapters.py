"""Adapters of PEFT as checkpoints: LoRA and DoRA folders, with the names of today's ``peft`` or of the DoRA fork.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``). The fork that the paper's
adapters were trained with calls its type ``DORA`` and keeps the magnitudes as the weight (n, 1) of a linear layer;
``peft`` has LORA with ``use_dora`` and vectors (n,). Everything else is equal, so both convert exactly.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common.errors import CheckpointError

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_MAGNITUDE, FORK_MAGNITUDE = ".lora_magnitude_vector", ".weight_m_wdecomp.weight"
FORK_TYPE = "DORA"
FORK_OPTIONS = {"dora_simple": True, "Wdecompose_target_modules": None, "merge_weights": False}
FORK_ONLY = (*FORK_OPTIONS, "enable_lora")
SHARED_OPTIONS = (
    "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights", "lora_alpha",
    "lora_dropout", "modules_to_save", "r", "target_modules", "task_type",
)  # fmt: skip

logger = logging.getLogger(__name__)


def is_adapter_folder(path: str | Path) -> bool:
    """Whether ``path`` is a folder with an adapter's configuration."""
    return (Path(path) / CONFIG_FILE).is_file()


def weight_file(folder: str | Path) -> Path:
    """The file with an adapter's tensors.

    Raises: CheckpointError if there is none.
    """
    for name in WEIGHT_FILES:
        if (path := Path(folder) / name).is_file():
            return path
    raise CheckpointError(
        f"{folder} has {CONFIG_FILE} but neither {WEIGHT_FILES[0]} nor {WEIGHT_FILES[1]}; save the adapter again with "
        "save_pretrained."
    )


def read_adapter_config(folder: str | Path) -> dict[str, object]:
    """The adapter's configuration as it is written.

    Raises: CheckpointError if it is missing or no JSON mapping.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); save the adapter again.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no mapping of options; save the adapter again.")
    return config


def read_adapter(folder: str | Path) -> dict[str, Tensor]:
    """The adapter's tensors under the names that are in the file, sorted: file formats do not keep an order.

    Raises: CheckpointError if a file is missing or damaged.
    """
    path = weight_file(folder)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error}); copy it again.") from None
    except Exception as error:  # the unpickler's refusal has a type of its own
        raise CheckpointError(f"{path} holds more than tensors ({error}); save it as safetensors.") from None
    return {name: state[name] for name in sorted(state, key=natural_key)}


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sorts ``layers.2`` before ``layers.10``."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]


def is_fork_adapter(state: Mapping[str, Tensor]) -> bool:
    """Whether magnitudes have the fork's names."""
    return any(name.endswith(FORK_MAGNITUDE) for name in state)


def to_peft_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter of the fork (or of ``peft``, which stays as it is) as ``peft`` names and shapes it."""
    renamed = {}
    for name, tensor in state.items():
        if name.endswith(FORK_MAGNITUDE):
            name, tensor = name.removesuffix(FORK_MAGNITUDE) + PEFT_MAGNITUDE, tensor.reshape(-1)
        renamed[name] = tensor
    return renamed


def to_fork_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of ``to_peft_names``."""
    renamed = {}
    for name, tensor in state.items():
        stem = name.removesuffix(".weight")
        if stem.endswith(PEFT_MAGNITUDE):
            name, tensor = stem.removesuffix(PEFT_MAGNITUDE) + FORK_MAGNITUDE, tensor.reshape(-1, 1)
        renamed[name] = tensor
    return renamed


def to_peft_config(config: Mapping[str, object]) -> dict[str, object]:
    """A configuration that ``peft`` reads; the fork's type DORA becomes LORA with ``use_dora``."""
    if config.get("peft_type") != FORK_TYPE:
        return dict(config)
    kept = {key: value for key, value in config.items() if key not in FORK_ONLY}
    decomposed = config.get("Wdecompose_target_modules")
    if decomposed and set(decomposed) - set(config.get("target_modules") or ()):
        logger.warning(
            "The adapter scales %s without low-rank factors, which peft has not; they are left out.", decomposed
        )
    return {**kept, "peft_type": "LORA", "use_dora": True}


def to_fork_config(config: Mapping[str, object]) -> dict[str, object]:
    """A configuration as the fork writes it.

    Raises: CheckpointError if the adapter is not DoRA, which the fork's type stands for.
    """
    if config.get("peft_type") == FORK_TYPE:
        return dict(config)
    if not config.get("use_dora"):
        raise CheckpointError(
            f"an adapter with peft_type={config.get('peft_type')!r} and use_dora={config.get('use_dora')} has no "
            "counterpart in the DoRA fork; only DoRA adapters convert."
        )
    kept = {key: config[key] for key in SHARED_OPTIONS if key in config}
    return {**kept, "peft_type": FORK_TYPE, **FORK_OPTIONS}
