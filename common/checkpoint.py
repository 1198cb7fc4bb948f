"""Checkpoints that survive a kill at any moment, and weights in one safetensors file.

A checkpoint is a folder ``<run_dir>/checkpoints/step_00001000`` with a ``manifest.json`` that lists every file with its
size and sha256. It is written under a temporary name, synced to disk and renamed, so a folder with the final name is
complete; ``find_checkpoint`` verifies it all the same, because disks and copies do fail.
"""

import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from common import provenance
from common.config import CheckpointConfig
from common.errors import CheckpointError
from common.parallel import Parallel

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
MODEL_FILE, EMA_FILE, CONFIG_FILE = "model.safetensors", "ema.safetensors", "config.json"
_TEMPORARY = ".tmp_"


def checkpoints_dir(run_dir: Path) -> Path:
    return Path(run_dir) / "checkpoints"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step_"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders by final name, oldest first, unverified."""
    folders = checkpoints_dir(run_dir).glob("step_*")
    return sorted((f for f in folders if f.name.removeprefix("step_").isdigit()), key=step_of)


def remove_leftovers(run_dir: Path) -> None:
    """Deletes the temporary folders of saves and deletions that were killed."""
    for folder in checkpoints_dir(run_dir).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(folder, ignore_errors=True)


def find_checkpoint(run_dir: Path | str) -> Path | None:
    """The newest complete and verified checkpoint of a run, or None; damaged ones are skipped with a warning."""
    for folder in reversed(list_checkpoints(Path(run_dir))):
        problem = damage(folder)
        if problem is None:
            return folder
        logger.warning("checkpoint skipped: %s", problem)
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if every file is as its manifest says."""
    try:
        files = read_manifest(folder)["files"]
    except CheckpointError as error:
        return str(error)
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{path} has {path.stat().st_size} bytes instead of {expected['size']}"
        if sha256(path) != expected["sha256"]:
            return f"{path} is damaged (its sha256 differs from the manifest)"
    return None


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint.

    Raises: CheckpointError if it is missing or unreadable.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if manifest.pop("manifest_sha256") != _digest(manifest):
            raise ValueError
        return manifest
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, so {folder} is no complete checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is damaged (it does not match its own checksum)") from None


def _digest(manifest: Mapping) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Forces a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(
    run_dir: Path,
    step: int,
    stages: Sequence[Callable[[Path], None]],
    *,
    config: Mapping,
    parallel: Parallel,
    extra: Mapping | None = None,
) -> Path:
    """Writes, syncs and publishes one checkpoint. Collective.

    Args:
        stages: called in order with the temporary folder, on every rank. The ranks agree after each stage that it went
            well; so a stage must communicate before it writes, never after.
        config: the run's resolved configuration, stored in the manifest.
        extra: further entries of the manifest.

    Raises: CheckpointError on every rank if any rank failed (disk full, no permission); earlier checkpoints stay.
    """
    target = checkpoints_dir(run_dir) / f"step_{step:08d}"
    temporary = target.with_name(f"{_TEMPORARY}{target.name}")
    try:
        _together(functools.partial(_make_folder, temporary, parallel), target, parallel)
        for stage in stages:
            _together(functools.partial(stage, temporary), target, parallel)
        files = _together(functools.partial(_seal, temporary, parallel), target, parallel)
        manifest = {
            "step": step,
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **(extra or {}),
            "config": config,
            **provenance.collect(),
            "files": {name: entry for part in files for name, entry in part.items()},
        }
        publish = functools.partial(_publish, temporary, target, manifest)
        _together(publish if parallel.is_main else None, target, parallel)
    except (CheckpointError, RuntimeError):
        if parallel.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _make_folder(temporary: Path, parallel: Parallel) -> None:
    if parallel.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)


def _together(stage: Callable | None, target: Path, parallel: Parallel) -> list:
    """Runs ``stage`` on every rank; all raise if one failed, so that no rank waits for a failed one."""
    result, cause = None, None
    try:
        result = stage() if stage is not None else None
    except (Exception, CheckpointException) as error:  # the latter is a BaseException of torch's
        cause = error
    report = None if cause is None else (_explain(cause), _is_storage_error(cause))
    outcomes = parallel.gather((result, report))
    failures = [(f"rank {rank}: {report[0]}", report[1]) for rank, (_, report) in enumerate(outcomes) if report]
    if not failures:
        return [part for part, _ in outcomes]
    text = f"could not save {target}: {'; '.join(text for text, _ in failures)}."
    if not all(is_storage for _, is_storage in failures):
        raise RuntimeError(text) from cause
    raise CheckpointError(
        f"{text} Earlier checkpoints are intact. Free disk space or check permissions (a smaller checkpoint.keep_last "
        "needs less), then run the same command again."
    ) from cause


def _is_storage_error(error: BaseException) -> bool:
    """Whether ``error`` is a failed write; torch's file writers report those as RuntimeError."""
    in_torch = any(word in str(error) for word in ("inline_container", "PytorchStreamWriter"))
    return isinstance(error, OSError | SafetensorError | CheckpointException) or in_torch


def _explain(error: BaseException) -> str:
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
            return os.strerror(code)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def _seal(temporary: Path, parallel: Parallel) -> dict[str, dict]:
    """Syncs and hashes this rank's share of the files."""
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    sealed = {}
    for path in files[parallel.rank :: parallel.world_size]:
        sync(path)
        name = path.relative_to(temporary).as_posix()
        sealed[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    return sealed


def _publish(temporary: Path, target: Path, manifest: Mapping) -> None:
    manifest = json.loads(json.dumps(manifest, default=str))  # as it will be read
    write_json(temporary / MANIFEST, manifest | {"manifest_sha256": _digest(manifest)})
    for folder in [path for path in temporary.rglob("*") if path.is_dir()] + [temporary]:
        sync(folder)
    if target.exists():  # a damaged one of the same step, which the run has passed again
        _remove(target)
    os.rename(temporary, target)
    sync(target.parent)


def _remove(folder: Path) -> None:
    """Deletes a checkpoint so that a kill half-way leaves no folder with a final name."""
    doomed = folder.with_name(f"{_TEMPORARY}removed_{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def prune(run_dir: Path, config: CheckpointConfig) -> list[Path]:
    """Deletes all but the newest ``keep_last`` checkpoints and the multiples of ``keep_every``; returns the deleted."""
    doomed = list_checkpoints(run_dir)[: -config.keep_last]
    if config.keep_every:
        doomed = [folder for folder in doomed if step_of(folder) % config.keep_every]
    for folder in doomed:
        _remove(folder)
    return doomed


def write_json(path: Path, value: object) -> None:
    """Writes and syncs a JSON file, by way of a temporary name."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=1, default=str)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------- weights


def save_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes a state dict as one safetensors file.

    Tied tensors are stored once; the file's metadata names the others, and ``read_weights`` ties them again.
    """
    first: dict[tuple, str] = {}
    tied, unique = {}, {}
    for name, value in state.items():
        key = (value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride())
        if value.numel() and key in first:
            tied[name] = first[key]
            continue
        first[key] = name
        # a view of a larger buffer (DeepSpeed's flat groups) would be refused or drag the whole buffer along
        whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()
        unique[name] = value.detach() if whole else value.detach().clone(memory_format=torch.contiguous_format)
    save_file(unique, path, metadata={"format": "pt", **({"tied": json.dumps(tied)} if tied else {})})


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads one safetensors file, with tied tensors under all their names.

    Raises: CheckpointError if the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            state = {name: file.get_tensor(name) for name in names}
            tied = json.loads((file.metadata() or {}).get("tied", "{}"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist; give a run folder or an exported folder with {MODEL_FILE}."
        ) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is no readable safetensors file ({error}); copy it again, or resume from an older checkpoint."
        ) from None
    return state | {name: state[source] for name, source in tied.items()}


def export_weights(folder: Path | str, state_dict: Mapping[str, Tensor], config: Mapping, model_card: str) -> Path:
    """Writes ``model.safetensors``, ``config.json`` and ``README.md``, each complete or not at all; returns the folder.

    Raises: CheckpointError if the disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    partial = folder / f".{MODEL_FILE}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(partial, {name: value.detach().cpu() for name, value in state_dict.items()})
        sync(partial)
        os.replace(partial, folder / MODEL_FILE)
        write_json(folder / CONFIG_FILE, config)
        card = folder / ".README.md.tmp"
        card.write_text(model_card)
        os.replace(card, folder / "README.md")
        sync(folder)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"could not export to {folder}: {_explain(error)}. Free disk space or choose another folder."
        ) from None
    return folder


def load_weights(folder: Path | str, *, ema: bool = True) -> tuple[dict[str, Tensor], dict]:
    """Weights and configuration of a run folder (its newest checkpoint), a checkpoint folder or an exported folder.

    Args:
        ema: the moving average where the run kept one.

    Raises: CheckpointError if there is nothing to load.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give a run folder or an exported folder with {MODEL_FILE}.")
    if checkpoints_dir(folder).is_dir():
        newest = find_checkpoint(folder)
        if newest is None:
            raise CheckpointError(f"{folder} has no complete checkpoint yet; train at least one checkpoint interval.")
        folder = newest
    if (folder / MANIFEST).is_file():
        config = read_manifest(folder)["config"]
    elif (folder / CONFIG_FILE).is_file():
        try:
            config = json.loads((folder / CONFIG_FILE).read_text())
        except ValueError as error:
            raise CheckpointError(f"{folder / CONFIG_FILE} is not JSON ({error}); export the model again.") from None
    else:
        raise CheckpointError(f"{folder} holds neither {MANIFEST} nor {CONFIG_FILE}, so the model's shape is unknown.")
    averaged = ema and (folder / EMA_FILE).is_file()
    return read_weights(folder / (EMA_FILE if averaged else MODEL_FILE)), config
