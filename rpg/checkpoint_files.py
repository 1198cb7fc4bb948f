"""Files that hold one network: ``.pth`` (tensors only), ``.safetensors``, PEFT adapter folders, wrapped state dicts.

Everything is read on the CPU and without running code from the file. Written files appear whole or not at all and
replace nothing unless asked to.
"""

import contextlib
import json
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.config import require_choice
from common.errors import CheckpointError
from common.folders import write_folder
from rpg.adapters import (
    CONFIG_FILE,
    WEIGHT_FILES,
    is_adapter_folder,
    natural_key,
    read_adapter,
    to_peft_config,
    to_peft_names,
)
from rpg.structure import find_ties

FORMATS = ("pth", "safetensors", "peft")
PICKLED_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (*PICKLED_SUFFIXES, ".safetensors")
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")  # where training programs put the state dict
MAP_FILES_FROM_BYTES = 64 << 20  # larger files are mapped, so that a tensor is read when it is used
KEYS_FIELD, TIES_FIELD, METADATA_FIELD = "quintet.keys", "quintet.ties", "quintet.metadata"
ADAPTER_METADATA_FILE = "generation.json"

Format = Literal["pth", "safetensors", "peft"]


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file or PEFT folder; a wrapper such as ``{'meta', 'state_dict'}`` is taken off.

    Raises: CheckpointError if there is none, or it cannot be read without running code from it.
    """
    return unwrap(read_wrapped(path), path)


def read_wrapped(path: str | Path) -> Mapping[str, object]:
    """What is in the file, with its wrapper if it has one.

    Raises: CheckpointError, as ``read_checkpoint``.
    """
    path = Path(path)
    if path.is_dir():
        if is_adapter_folder(path):
            return read_adapter(path)
        raise CheckpointError(f"{path} is a folder without {CONFIG_FILE}; give a file or an adapter's folder.")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a .pth or .safetensors file or an adapter's folder.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    loaded = _read_pickled(path)
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(loaded).__name__}, not a state dict; save model.state_dict() instead of the model."
        )
    return loaded


def unwrap(loaded: Mapping[str, object], path: str | Path) -> dict[str, Tensor]:
    """The state dict inside ``loaded``, detached.

    Raises: CheckpointError if there is none.
    """
    if not all(isinstance(value, Tensor) for value in loaded.values()):
        inner = next((loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
        if inner is not None:
            loaded = inner
    for name, value in loaded.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: key {name!r} is of type {type(value).__name__}, not a tensor; a checkpoint is a state dict, "
                f"or one under {', '.join(WRAPPERS)}."
            )
    if not loaded:
        raise CheckpointError(f"{path} holds no tensor.")
    return {str(name): value.detach() for name, value in loaded.items()}


def _read_pickled(path: Path) -> object:
    mapped = path.stat().st_size >= MAP_FILES_FROM_BYTES
    try:
        if mapped:
            # files of old versions of torch cannot be mapped
            with contextlib.suppress(RuntimeError):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("Check the documentation")[0].strip().splitlines()
        refused = next((line.strip() for line in reason if "GLOBAL" in line or "Unsupported" in line), reason[0])
        raise CheckpointError(
            f"{path} holds objects other than tensors, which are not loaded because that could run code: {refused} "
            "Save only the state dict, best as safetensors."
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read ({first}); it is damaged or no checkpoint.") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as stream:
            facts = stream.metadata() or {}
            names = json.loads(facts[KEYS_FIELD]) if KEYS_FIELD in facts else sorted(stream.keys(), key=natural_key)
            ties = json.loads(facts.get(TIES_FIELD, "{}"))
            state: dict[str, Tensor] = {}
            for name in names:
                state[name] = state[ties[name]] if name in ties else stream.get_tensor(name)
            return state
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}); it is damaged or no safetensors file."
        ) from None


# ---------------------------------------------------------------- writing


def write_checkpoint(
    path: str | Path,
    state: Mapping[str, Tensor],
    kind: Format | None = None,
    metadata: Mapping[str, object] | None = None,
    *,
    overwrite: bool = False,
    adapter_config: Mapping[str, object] | None = None,
) -> Path:
    """Writes one network; it loads with ``strict=True`` (``peft``: with ``PeftModel.from_pretrained``).

    Args:
        kind: None: by the suffix, or ``peft`` for a path without one and an ``adapter_config``.
        metadata: JSON-able facts about it: in the header of safetensors, ``<name>.json`` beside a ``.pth``,
            ``generation.json`` in an adapter's folder.
        overwrite: replace what is there.
        adapter_config: the options of a PEFT adapter; needed for ``peft``.

    Raises:
        CheckpointError: ``path`` exists, or cannot be written.
    """
    path = Path(path)
    if kind is None:
        kind = {".safetensors": "safetensors", "": "peft"}.get(path.suffix, "pth")
    require_choice("format", kind, FORMATS)
    if path.exists() and not overwrite:
        raise _exists(path)
    facts = dict(metadata or {})
    if kind == "peft":
        return _write_adapter(path, state, facts, adapter_config, overwrite)
    if kind == "pth" and facts:
        beside, text = path.with_suffix(".json"), json.dumps(facts, indent=1)
        if beside.exists() and not overwrite and not _describes(beside, facts):
            raise _exists(beside)
        save_atomically(beside, lambda temporary: temporary.write_text(text), overwrite=True)
    return save_atomically(path, lambda temporary: _save(temporary, state, kind, facts), overwrite=overwrite)


def read_metadata(path: str | Path) -> dict[str, object]:
    """What ``write_checkpoint`` was given as ``metadata``; empty if there is none.

    Raises: CheckpointError if it cannot be read.
    """
    path = Path(path)
    try:
        if path.is_dir():
            beside = path / ADAPTER_METADATA_FILE
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as stream:
                return json.loads((stream.metadata() or {}).get(METADATA_FIELD, "{}"))
        else:
            beside = path.with_suffix(".json")
        return json.loads(beside.read_text()) if beside.is_file() else {}
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"the metadata of {path} cannot be read ({error}).") from None


def _exists(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} exists and is not replaced; add overwrite=true, or choose another folder.")


def _describes(path: Path, facts: Mapping[str, object]) -> bool:
    """Whether a file is metadata of the same kind, left by a program that was killed before it wrote the network."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.keys() == facts.keys()


def save_atomically(path: Path, write: Callable[[Path], object], *, overwrite: bool = False) -> Path:
    """Has ``write`` fill a temporary file, which then appears as ``path``.

    Raises: CheckpointError if it exists and may not be replaced, or cannot be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        temporary.chmod(0o644)
        if overwrite:
            os.replace(temporary, path)
        else:
            _link(temporary, path)
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written ({error.strerror or error}); free disk space or choose another folder."
        ) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike a rename, this fails if another process was faster
    except FileExistsError:
        raise _exists(path) from None
    except OSError:  # a file system without links
        if path.exists():
            raise _exists(path) from None
        os.replace(temporary, path)


def _save(path: Path, state: Mapping[str, Tensor], kind: str, facts: Mapping[str, object]) -> None:
    tensors, ties = compact(state)
    if kind == "pth":
        torch.save(tensors, path)
        return
    header = {"format": "pt", KEYS_FIELD: json.dumps(list(tensors)), TIES_FIELD: json.dumps(ties)}
    if facts:
        header[METADATA_FIELD] = json.dumps(facts)
    # other readers expect every key, so that tied tensors are written once per key
    save_file({name: tensor.clone() if name in ties else tensor for name, tensor in tensors.items()}, path, header)


def compact(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """CPU tensors that share memory only where they are the same tensor, and which keys those are.

    A view into a larger tensor would otherwise be written with all of it.
    """
    ties = find_ties(state)
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in ties:
            tensors[name] = tensors[ties[name]]
            continue
        tensor = tensor.detach().cpu()
        is_part = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format) if is_part else tensor.contiguous()
    return tensors, ties


def _write_adapter(
    path: Path, state: Mapping[str, Tensor], facts: dict, config: Mapping[str, object] | None, overwrite: bool
) -> Path:
    if config is None:
        raise CheckpointError(
            f"format=peft needs the options of the adapter ({CONFIG_FILE}), but this generator was trained on plain "
            "state dicts; use format=pth or format=safetensors."
        )
    if path.exists() and not overwrite:
        raise _exists(path)

    def write(folder: Path) -> None:
        _save(folder / WEIGHT_FILES[0], to_peft_names(state), "safetensors", {})
        (folder / CONFIG_FILE).write_text(json.dumps(to_peft_config(config), indent=2))
        if facts:
            (folder / ADAPTER_METADATA_FILE).write_text(json.dumps(facts, indent=1))

    return write_folder(path, write)


# ---------------------------------------------------------------- finding


def find_checkpoints(folder: str | Path, pattern: str | None = None) -> list[Path]:
    """All checkpoints below ``folder``, sorted by their relative path: equal on every file system.

    Args:
        pattern: glob relative to ``folder``, e.g. ``*seed000[0-2]*`` (file names) or ``run1/*.pth`` (with folders);
            None: every file with a known suffix and every adapter's folder.

    Raises: CheckpointError if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"data.checkpoints={folder} is no folder; give the folder that holds the checkpoints.")
    if is_adapter_folder(folder):
        raise CheckpointError(
            f"data.checkpoints={folder} is one adapter; give the folder that holds several adapters' folders."
        )
    found = []
    for root, names, files in os.walk(folder):
        here = Path(root)
        adapters = [name for name in names if is_adapter_folder(here / name)]
        found += [here / name for name in adapters]
        names[:] = [name for name in names if name not in adapters and not _is_ours(name)]
        found += [here / name for name in files if Path(name).suffix in SUFFIXES and not name.startswith(".")]
    if pattern is not None:
        found = [path for path in found if _matches(path.relative_to(folder), pattern)]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _is_ours(name: str) -> bool:
    """Hidden folders and token caches."""
    return name.startswith(".") or name.endswith(".rpg")


def _matches(relative: Path, pattern: str) -> bool:
    return relative.match(pattern)


def names_of(paths: Sequence[Path], folder: str | Path) -> list[str]:
    """Relative paths as text with forward slashes."""
    return [path.relative_to(folder).as_posix() for path in paths]
