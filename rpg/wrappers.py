"""State dicts in the wrappers of other programs, and adapters in the fork's naming: taken off and put back.

Detection and segmentation frameworks save ``{'meta': ..., 'state_dict': ...}`` and expect it back. A generator learns
the state dict alone; ``wrap`` puts a generated one into the wrapper of an original, so that the framework's own test
program reads it.
"""

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from common.config import require_choice
from common.errors import CheckpointError
from common.folders import write_folder
from rpg.adapters import (
    CONFIG_FILE,
    is_adapter_folder,
    read_adapter,
    read_adapter_config,
    to_fork_config,
    to_fork_names,
)
from rpg.checkpoint_files import (
    WRAPPERS,
    compact,
    find_checkpoints,
    read_checkpoint,
    read_wrapped,
    save_atomically,
    unwrap,
    write_checkpoint,
)
from rpg.structure import require_same_layout

TARGETS = ("plain", "wrapped", "peft", "fork")
META, STATE_DICT = "meta", "state_dict"
FORK_WEIGHTS = "adapter_model.bin"

Target = Literal["plain", "wrapped", "peft", "fork"]


class _Ignored:
    """Stands for an object of another program's class: takes everything, does nothing."""

    def __init__(self, *_arguments: object, **_options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_ignoring_objects(path: Path) -> Mapping[str, object]:
    """A ``.pth`` in which objects of unknown classes are left out, such as a framework's training history.

    No code of the file or of those classes runs: each class is replaced by one that does nothing.

    Raises: CheckpointError if it still cannot be read.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins = [(_Ignored, name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError, EOFError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read even without its objects ({reason}).") from None
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a state dict.")
    return {key: value for key, value in loaded.items() if not _holds_ignored(value)}


def _holds_ignored(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_ignored(entry) for entry in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_ignored(entry) for entry in value)
    return isinstance(value, _Ignored)


def wrap(state: Mapping[str, Tensor], template: Mapping[str, object] | None = None) -> dict[str, object]:
    """``{'meta': ..., 'state_dict': state}``; with a template, its other entries and its key of the state dict.

    Raises: CheckpointError if the template has no state dict, or one of other keys or shapes.
    """
    if template is None:
        return {META: {}, STATE_DICT: dict(state)}
    key = next((key for key in WRAPPERS if isinstance(template.get(key), Mapping)), None)
    if key is None:
        raise CheckpointError(
            f"the template has none of the entries {', '.join(WRAPPERS)}; give one of the original wrapped files."
        )
    original = unwrap(template, "the template")
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in original.items()}
    require_same_layout(layout, state, "the network", "the template")
    return {name: dict(state) if name == key else value for name, value in template.items()}


def convert(
    source: str | Path,
    output: str | Path,
    to: Target,
    *,
    suffix: str = ".pth",
    template: str | Path | None = None,
    ignore_objects: bool = False,
    overwrite: bool = False,
) -> list[Path]:
    """Converts a file, an adapter's folder or a folder of either; names stay, below ``output``.

    Args:
        to: ``plain`` state dicts; ``wrapped`` ones in the wrapper of ``template``; ``peft`` or ``fork`` adapters.
        suffix: of plain files, ``.pth`` or ``.safetensors``.
        ignore_objects: leave out what is no tensor and would need another program's classes.

    Returns: what was written.

    Raises: CheckpointError if something cannot be read, does not fit or exists.
    """
    require_choice("to", to, TARGETS)
    require_choice("format", suffix, (".pth", ".safetensors"))
    source, output = Path(source), Path(output)
    shape = read_wrapped(template) if template is not None else None
    return [
        _convert_one(path, place, to, suffix, shape, ignore_objects, overwrite)
        for path, place in _places(source, output, to, suffix)
    ]


def _places(source: Path, output: Path, to: str, suffix: str) -> Iterator[tuple[Path, Path]]:
    """Every checkpoint of the source, and where its conversion goes."""
    if source.is_dir() and not is_adapter_folder(source):
        found = find_checkpoints(source)
        if not found:
            raise CheckpointError(f"input={source} holds no checkpoint.")
        for path in found:
            place = output / path.relative_to(source)
            yield path, place if to in ("peft", "fork") else place.with_suffix(suffix if to == "plain" else ".pth")
    else:
        yield source, output


def _convert_one(
    path: Path, place: Path, to: str, suffix: str, template: Mapping | None, ignore_objects: bool, overwrite: bool
) -> Path:
    if to in ("peft", "fork"):
        return _convert_adapter(path, place, to, overwrite)
    if ignore_objects and path.is_file() and path.suffix != ".safetensors":
        state = unwrap(read_ignoring_objects(path), path)
    else:
        state = read_checkpoint(path)
    if to == "plain":
        return write_checkpoint(place, state, "safetensors" if suffix == ".safetensors" else "pth", overwrite=overwrite)
    wrapped = wrap(compact(state)[0], template)
    return save_atomically(place, lambda temporary: torch.save(wrapped, temporary), overwrite=overwrite)


def _convert_adapter(path: Path, place: Path, to: str, overwrite: bool) -> Path:
    if not is_adapter_folder(path):
        raise CheckpointError(f"{path} is no adapter's folder ({CONFIG_FILE}); to={to} converts adapters only.")
    state, config = read_adapter(path), read_adapter_config(path)
    if to == "peft":
        return write_checkpoint(place, state, "peft", adapter_config=config, overwrite=overwrite)
    if place.exists() and not overwrite:
        raise CheckpointError(f"{place} exists and is not replaced; add overwrite=true, or choose another folder.")

    def write(folder: Path) -> None:
        torch.save(compact(to_fork_names(state))[0], folder / FORK_WEIGHTS)
        (folder / CONFIG_FILE).write_text(json.dumps(to_fork_config(config), indent=2))

    return write_folder(place, write)
