"""Hypernetworks to disk and back: an exported folder, a run, a published file, a checkpoint of the reference's trainer.

    model.safetensors   every tensor once, under the published names
    config.json         options of the hypernetwork (``model``), revision, seed, step and whatever the run adds
    README.md           a model card

A folder appears whole or not at all, and none is replaced unless that is asked for.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import provenance
from common.checkpoint import (
    CONFIG_FILE,
    MODEL_FILE,
    checkpoints_dir,
    export_weights,
    load_weights,
    read_weights,
    sha256,
)
from common.conversion import from_config
from common.errors import CheckpointError
from common.folders import write_folder
from logah.model_config import HyperNetworkConfig
from logah.released import (
    ALIASES,
    SUFFIXES,
    WRAPPERS,
    add_aliases,
    drop_aliases,
    extend_tables,
    infer_config,
    own_layout,
    read_released,
    reference_options,
)

FORMAT = 1
EXPORT_FOLDER = "export"  # of a run that has ended
HUB = "SamsungSAILMontreal/ghn3"
PUBLISHED = ("ghn3tm8.pt", "ghn3sm8.pt", "ghn3lm8.pt", "ghn3xlm16.pt", "ghn2.pt")
PLACEHOLDERS = ("decoder_1d.0.", "bias_class.1.", "decoder.l1.")
"""Tensors of low-rank models that nothing reads; a file without them is complete."""

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
    from logah.hypernetwork import HyperNetwork

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


# ------------------------------------------------------------------------------------------------------- writing


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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # one storage under two names is stored once
        torch.save({"state_dict": add_aliases(state), "config": options, "epoch": 0, "step": 0}, temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} could not be written ({error}); free disk space or choose another.") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises CheckpointError if ``folder`` holds something that must not be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"out={folder} is a file; give a folder.")
    holds_one = (folder / MODEL_FILE).is_file() and (folder / CONFIG_FILE).is_file()
    if holds_one and not overwrite:
        raise CheckpointError(f"out={folder} holds weights already; choose another folder, or set overwrite=true.")
    if not holds_one and any(folder.iterdir()):
        raise CheckpointError(f"out={folder} holds other files; choose another folder.")


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
