"""Folders with the weights of a network: what a prediction or a finetuned network is stored as and read from.

    model.safetensors    every parameter and buffer under its own name; or several files and an index of them
    architecture.json    the network (``logah.architectures``)
    config.json, generation_config.json    networks of transformers only: ``from_pretrained`` reads the folder
    prediction.json      where the numbers come from: options, seed, which parameters were predicted

A folder appears whole or not at all, and none is replaced unless that is asked for.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import provenance
from common.checkpoint import MODEL_FILE, read_weights, write_json
from common.errors import CheckpointError
from common.folders import write_folder
from logah.architectures import Architecture
from logah.shard_writer import GIGABYTE, INDEX_FILE, PlannedTensor, ShardWriter, plan_shards

ARCHITECTURE_FILE, REPORT_FILE = "architecture.json", "prediction.json"
SHARD_BYTES = 5 * GIGABYTE
"""Most bytes of weights in one file, unless told otherwise."""

FORMAT = 1


def write_module_folder(
    folder: Path | str,
    architecture: Architecture,
    module: nn.Module,
    *,
    metadata: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Writes the weights of ``module``, built from ``architecture``, so that ``load_prediction`` reads them.

    Args:
        metadata: what else ``prediction.json`` should say: seed, run, step.
        dtype: of the floating-point numbers; None: as they are.

    Raises: CheckpointError if something is there already, or the disk is full.
    """
    folder = Path(folder)
    check_out(folder, overwrite)
    tensors, tied = stored_tensors(module, dtype)
    values = module.state_dict()

    def write(target: Path) -> None:
        with ShardWriter(target, plan_shards(tensors, max_shard_bytes), tied) as writer:
            for tensor in tensors:
                writer.write(tensor.name, values[tensor.name].to(tensor.dtype))
            writer.finish()
        describe_folder(target, architecture, module, dtype or _dtype_of(tensors), metadata or {})

    return write_folder(folder, write)


def describe_folder(
    folder: Path, architecture: Architecture, module: nn.Module, dtype: torch.dtype, report: Mapping[str, Any]
) -> None:
    """Writes every file of a folder except the weights.

    Args:
        module: the network, with or without numbers.
        dtype: of the weights.
    """
    write_json(folder / ARCHITECTURE_FILE, architecture.to_json())
    write_json(folder / REPORT_FILE, {"format": FORMAT, **provenance.collect(), **report})
    if is_transformers(module):
        config = architecture.hf_config()
        config.architectures = [type(module).__name__]
        config.dtype = dtype
        config.save_pretrained(folder)
        if getattr(module, "generation_config", None) is not None:
            module.generation_config.save_pretrained(folder)


def is_transformers(module: nn.Module) -> bool:
    """Whether ``module`` is a network of transformers."""
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def stored_tensors(module: nn.Module, dtype: torch.dtype | None = None) -> tuple[list[PlannedTensor], dict[str, str]]:
    """What a file with the state of ``module`` holds: every tensor once, and the further names of tied ones.

    Args:
        dtype: of the floating-point tensors; None: as they are.
    """
    owners = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    tensors, tied = [], {}
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            continue
        # tied weights are one object; on `meta` they have no address to compare
        source = first.setdefault(id(owners.get(name, value)), name)
        if source != name:
            tied[name] = source
            continue
        kept = value.dtype if dtype is None or not value.is_floating_point() else dtype
        tensors.append(PlannedTensor(name, tuple(value.shape), kept))
    return tensors, tied


def check_out(folder: Path, overwrite: bool) -> None:
    """Raises CheckpointError if ``folder`` holds something that must not be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"out={folder} is a file; give a folder.")
    ours = (folder / ARCHITECTURE_FILE).is_file() or (folder / REPORT_FILE).is_file()
    if ours and not overwrite:
        raise CheckpointError(
            f"out={folder} holds weights already; choose another folder, or replace it with overwrite=true."
        )
    if not ours and any(folder.iterdir()):
        raise CheckpointError(f"out={folder} holds other files; choose another folder.")


# ------------------------------------------------------------------------------------------------------------ reading


def read_architecture(folder: Path | str) -> Architecture:
    """The network whose weights a folder holds.

    Raises: CheckpointError if it names none.
    """
    path = Path(folder) / ARCHITECTURE_FILE
    return Architecture.from_json(_read_json(path), where=str(path))


def read_report(folder: Path | str) -> dict[str, Any]:
    """Contents of ``prediction.json``."""
    return _read_json(Path(folder) / REPORT_FILE)


def read_state(folder: Path | str) -> dict[str, Tensor]:
    """All tensors of a folder under all their names, from one file or several.

    Raises: CheckpointError if one is missing or damaged.
    """
    folder = Path(folder)
    if not (folder / INDEX_FILE).is_file():
        return read_weights(folder / MODEL_FILE)
    where = _read_json(folder / INDEX_FILE)["weight_map"]
    state: dict[str, Tensor] = {}
    for file_name in dict.fromkeys(where.values()):
        state |= read_weights(folder / Path(file_name).name)
    missing = sorted(where.keys() - state.keys())
    if missing:
        raise CheckpointError(f"{folder / INDEX_FILE} lists {missing[0]!r}, which its file lacks; predict it again.")
    return state


def load_prediction(folder: Path | str, module: nn.Module | None = None) -> nn.Module:
    """The network of a folder with its weights, float32, on the CPU, in evaluation mode.

    Args:
        module: the network to fill, with its own types and device; None: a new one. A network of code of your own
            (``module:PACKAGE.MODULE:NAME``) must be given, because no code is imported on the word of a file.

    Raises: CheckpointError if the weights do not fill the network exactly.
    """
    folder = Path(folder)
    if module is None:
        architecture = read_architecture(folder)
        with torch.random.fork_rng(devices=[]):
            module = architecture.build()
    try:
        module.load_state_dict(read_state(folder), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: the weights do not fit {type(module).__name__}: {error}") from None
    return module.eval()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist; give a folder that logah.predict or logah.finetune wrote."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable JSON file ({error}); write the folder again.") from None


def _dtype_of(tensors: list[PlannedTensor]) -> torch.dtype:
    return next((tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point), torch.float32)
