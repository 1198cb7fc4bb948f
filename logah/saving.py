"""Hypernetworks to disk: weights and options in one folder, or one file in the reference's layout.

    model.safetensors   every tensor once, under the published names
    config.json         options of the hypernetwork (``model``), revision, seed, step and whatever the run adds
    README.md           a model card

A folder appears whole or not at all, and none is replaced unless that is asked for.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import provenance
from common.checkpoint import CONFIG_FILE, MODEL_FILE, export_weights
from common.errors import CheckpointError
from common.folders import require_replaceable, write_file, write_folder
from logah.model_config import HyperNetworkConfig
from logah.released import WRAPPERS, add_aliases, drop_aliases, reference_options

FORMAT = 1


def save_hypernetwork(
    folder: Path | str,
    model: nn.Module,
    metadata: Mapping[str, Any] | None = None,
    *,
    state: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a folder that ``load_hypernetwork`` reads; returns it.

    Args:
        model: has ``config``; not wrapped, whatever wraps the names of ``state``.
        metadata: what else should travel with it: ``seed``, ``step``, data, ...
        state: weights to write instead of the model's own, e.g. their moving average.
        overwrite: replace a hypernetwork that is there.

    Raises: CheckpointError if something is there already, or the disk is full.
    """
    folder = Path(folder)
    check_output(folder, overwrite)
    tensors = plain_state(model.state_dict() if state is None else state)
    described = describe(model.config, metadata)
    card = model_card(model.config, sum(value.numel() for value in tensors.values()), described)
    return write_folder(folder, lambda target: export_weights(target, tensors, described, card))


def describe(config: HyperNetworkConfig, metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Contents of ``config.json``."""
    own = json.loads(json.dumps(asdict(config)))
    return {"format": FORMAT, **provenance.collect(), **(metadata or {}), "model": own}


def plain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their published names, each once, without what wrappers put before a name."""
    return drop_aliases({WRAPPERS.sub("", name): value.detach() for name, value in state.items()})


def save_reference(path: Path | str, model: nn.Module, *, overwrite: bool = False) -> Path:
    """Writes a ``.pt`` in the layout of the reference's trainer: ``state_dict`` with all names, and ``config``.

    The file holds no optimizer; the reference evaluates it, but cannot resume from it.

    Raises: CheckpointError if the file exists, or the reference does not have this kind of decoder.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise CheckpointError(f"out={path} exists; choose another name, or replace it with overwrite=true.")
    options = reference_options(model.config)
    state = {name: value.cpu().contiguous() for name, value in plain_state(model.state_dict()).items()}
    stored = {
        "state_dict": add_aliases(state),
        "config": options,
        "epoch": 0,
        "step": 0,
    }  # one storage under two names is stored once
    return write_file(path, lambda temporary: torch.save(stored, temporary))


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises CheckpointError if ``folder`` holds something that must not be replaced."""
    ours = (folder / MODEL_FILE).is_file() and (folder / CONFIG_FILE).is_file()
    require_replaceable(folder, overwrite, ours=ours, what="a hypernetwork", option="out")


def model_card(config: HyperNetworkConfig, num_parameters: int, described: Mapping[str, Any]) -> str:
    """Text of ``README.md``."""
    known = {
        key: described[key] for key in ("git_revision", "seed", "step", "released") if described.get(key) is not None
    }
    kind = {"lowrank": f"low-rank decoder of rank {config.lora_r}", "dense": "dense decoder"}
    return "\n".join(
        [
            "---",
            "tags: [hypernetwork, weight-initialisation]",
            "---",
            "",
            f"# Graph hypernetwork for {'language' if config.variant == 'llm' else 'vision'} models",
            "",
            f"Predicts the parameters of a network from its graph (LoGAH, arXiv 2405.16287): {num_parameters:,} "
            f"parameters, {config.layers} layers of width {config.hid} with {config.heads} heads, "
            f"{kind.get(config.decoder, config.decoder)}. It expects graphs of version {config.graph_version}, with "
            f"attention {config.attention} and virtual edges up to {config.ve_cutoff}.",
            "",
            "```bash",
            "python -m logah.predict checkpoint=path/of/this/folder "
            f"target={'gpt2' if config.variant == 'llm' else 'resnet50'} out=predicted",
            "```",
            "",
            "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in known.items()),
            "",
        ]
    )
