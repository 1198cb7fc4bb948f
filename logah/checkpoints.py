"""Hypernetworks from disk: an exported folder, a run, a published file, a checkpoint of the reference's trainer."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoint import (
    CONFIG_FILE,
    MODEL_FILE,
    checkpoints_dir,
    load_weights,
    read_weights,
    sha256,
)
from common.conversion import from_config
from common.errors import CheckpointError
from logah.hypernetwork import PLACEHOLDERS, HyperNetwork
from logah.model_config import HyperNetworkConfig
from logah.released import (
    ALIASES,
    SUFFIXES,
    add_aliases,
    drop_aliases,
    extend_tables,
    infer_config,
    own_layout,
    read_released,
)
from logah.saving import check_output, save_hypernetwork, save_reference

EXPORT_FOLDER = "export"  # of a run that has ended
HUB = "SamsungSAILMontreal/ghn3"
PUBLISHED = ("ghn3tm8.pt", "ghn3sm8.pt", "ghn3lm8.pt", "ghn3xlm16.pt", "ghn2.pt")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A hypernetwork ready to predict.

    Attributes:
        model: in eval mode, without gradients, on the device asked for.
        metadata: ``seed``, ``step``, ``git_revision``, ...; of a reference's file what it says about itself.
        source: what was loaded, for reports.
        digest: sha256 of the file with the weights; None for a run that has not ended.
    """

    model: nn.Module
    config: HyperNetworkConfig
    metadata: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    digest: str | None = None


def build_empty(config: HyperNetworkConfig) -> nn.Module:
    """A hypernetwork whose tensors hold no memory yet; ``load_state`` gives it some."""
    with torch.device("meta"):
        return build(config)


def build(config: HyperNetworkConfig) -> nn.Module:
    """A hypernetwork with fresh weights: LoGAH, GHN-3 or GHN-2, as ``config.decoder`` says."""
    if config.decoder == "ghn2":
        from logah.ghn2 import GHN2

        return GHN2(config)
    return HyperNetwork(config)


# ------------------------------------------------------------------------------------------------------- reading


def load_hypernetwork(
    path: Path | str, device: torch.device | str = "cpu", *, ema: bool = True, **overrides: Any
) -> Loaded:
    """The hypernetwork of an exported folder, a run folder, or a file of the reference implementations.

    Args:
        ema: the moving average where a run or a trainer's checkpoint has one; an export holds one of both.
        overrides: of a reference's file: options of ``HyperNetworkConfig`` that it does not hold, as ``heads``,
            ``max_shape``, ``num_classes``, ``attention`` and ``ve_cutoff``; ``variant="llm"`` gives a vision model
            the node types and sizes of language models. None: as the file says. Of ours: only ``variant``,
            ``normalisation``, ``residual_scale``, ``initializer_range`` and ``class_token_noise``, which no tensor
            depends on.

    Raises: CheckpointError if nothing loadable is there, or a file is damaged or does not fit, naming it.
    """
    path = Path(path)
    if path.is_file() and path.name == MODEL_FILE:
        path = path.parent
    if not path.exists():
        raise CheckpointError(_nothing_there(path))
    if path.is_file():
        return _load_released(path, device, ema, overrides)
    if (path / EXPORT_FOLDER / MODEL_FILE).is_file():
        path = path / EXPORT_FOLDER
    if (path / MODEL_FILE).is_file() and (path / CONFIG_FILE).is_file():
        state, described = read_weights(path / MODEL_FILE), _read_config(path / CONFIG_FILE)
        return _load_own(path, state, described, device, overrides, sha256(path / MODEL_FILE))
    if checkpoints_dir(path).is_dir():
        state, described = load_weights(path, ema=ema)
        return _load_own(path, state, described, device, overrides, None)
    files = [file for suffix in SUFFIXES for file in sorted(path.glob(f"*{suffix}"))]
    if len(files) == 1:
        return _load_released(files[0], device, ema, overrides)
    present = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"checkpoint={path} holds no hypernetwork: {EXPORT_FOLDER}/ of a run, {MODEL_FILE} with {CONFIG_FILE}, or one "
        f"file of a reference implementation is needed; it has {present}."
    )


def _nothing_there(path: Path) -> str:
    if path.name in PUBLISHED:
        return (
            f"checkpoint={path} is not on this machine; download it first: hf download {HUB} {path.name} "
            "--local-dir ., then give the path of the file."
        )
    return (
        f"checkpoint={path} does not exist; give a run folder, an exported folder, or a file of a reference "
        f"implementation ({', '.join(PUBLISHED)}, checkpoint.pt)."
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable as JSON ({error}); export the hypernetwork again.") from None
    if not isinstance(described, dict):
        raise CheckpointError(f"{path} holds no options; export the hypernetwork again.")
    return described


FREE_OPTIONS = ("normalisation", "residual_scale", "initializer_range", "class_token_noise", "variant")
"""Options that may be changed when a hypernetwork of ours is loaded."""


def _load_own(
    path: Path,
    state: Mapping[str, Tensor],
    described: dict[str, Any],
    device: torch.device | str,
    overrides: Mapping[str, Any],
    digest: str | None,
) -> Loaded:
    if not isinstance(described.get("model"), Mapping):
        raise CheckpointError(
            f"{path} is no hypernetwork: its configuration has no part `model`; give a run of python -m logah.train, "
            "an exported folder or a file of a reference implementation."
        )
    stored = from_config(HyperNetworkConfig, described["model"], f"{path}: model")
    options = asdict(stored)
    for name, value in overrides.items():
        if value is None or _same(options[name], value):
            continue
        if name not in FREE_OPTIONS:
            raise CheckpointError(
                f"{path} was made with {name}={options[name]} and cannot be used with {name}={value}; leave the option "
                "out."
            )
        options[name] = value
    config = HyperNetworkConfig(**options)
    model = build_empty(config)
    load_state(model, own_layout(state, str(path)), str(path))
    metadata = {name: value for name, value in described.items() if name not in ("model", "format")}
    return Loaded(_ready(model, device), config, metadata, str(path), digest)


def _same(stored: Any, value: Any) -> bool:
    return stored == value or isinstance(stored, tuple) and isinstance(value, list) and stored == tuple(value)


def _load_released(path: Path, device: torch.device | str, ema: bool, overrides: Mapping[str, Any]) -> Loaded:
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"checkpoint={path} is no weight file; {', '.join(SUFFIXES)} load, and folders.")
    released = read_released(path, ema=ema)
    config = infer_config(released, str(path), **overrides)
    model = build_empty(config)
    load_state(model, released.state, str(path))
    return Loaded(_ready(model, device), config, {"released": path.name, **released.facts}, str(path), sha256(path))


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Puts tensors into a hypernetwork; tables that language models have more rows of are extended.

    Args:
        state: under the published names; second names of a tensor may be among them.

    Raises: CheckpointError that names tensors which are missing, unexpected or of another shape (both shapes).
    """
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(tuple(ALIASES))}
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    state = extend_tables(drop_aliases(state, source), shapes, source)
    if model.config.decoder == "lowrank" and not model.config.use_1d_decoder:
        state = {name: torch.zeros(shapes[name]) for name in own if name.startswith(PLACEHOLDERS)} | state
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in own]
    problems += [
        f"{name} is {tuple(state[name].shape)} instead of {shapes[name]}"
        for name in own
        if name in state and tuple(state[name].shape) != shapes[name]
    ]
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise CheckpointError(f"{source} does not fit this hypernetwork: {'; '.join(problems[:6])}{more}.")
    dtypes = {name: value.dtype for name, value in own.items()}
    ready = {name: state[name].to(dtypes[name]).contiguous() for name in own}
    model.load_state_dict(add_aliases(ready), strict=True, assign=True)


def _ready(model: nn.Module, device: torch.device | str) -> nn.Module:
    return model.eval().requires_grad_(False).to(device)


# ------------------------------------------------------------------------------------------------------- converting


def convert(
    source: Path | str,
    out: Path | str,
    *,
    to: str = "quintet",
    ema: bool = True,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Writes the hypernetwork of ``source`` as a folder, or as one file in the reference's layout; returns ``out``.

    Args:
        options: see ``load_hypernetwork``.

    Raises: CheckpointError if the source cannot be read, or something is at ``out`` already.
    """
    out = Path(out)
    if to == "quintet":
        check_output(out, overwrite)  # before gigabytes are read
    loaded = load_hypernetwork(source, ema=ema, **options)
    if to == "reference":
        return save_reference(out, loaded.model, overwrite=overwrite)
    metadata = {**loaded.metadata, "source": Path(loaded.source).name}
    return save_hypernetwork(out, loaded.model, metadata, overwrite=overwrite)
