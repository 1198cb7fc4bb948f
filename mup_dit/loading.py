"""Models from disk: our runs and exports, the reference's checkpoints, diffusers' folders, the hub.

``load_model`` accepts

* a run folder or a checkpoint folder of ours (the newest complete checkpoint, moving average);
* a folder that ``save_model`` wrote (``model.safetensors``, ``config.json``);
* a ``.pt`` of DiT or a ``.pth`` of PixArt-alpha, by muP or not, or a folder that holds one;
* a folder of diffusers: a DiT, PixArt or SD3 transformer, or a pipeline with one below ``transformer/``;
* a hub name such as ``facebook/DiT-XL-2-256``, or a file of one, ``owner/name/file.pt``.

Nothing is executed: pickled files are read by ``weights_only``.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import (
    CONFIG_FILE,
    MANIFEST,
    MODEL_FILE,
    checkpoints_dir,
    list_checkpoints,
    load_weights,
    read_weights,
)
from common.errors import CheckpointError, ConfigError
from mup_dit.array_dataset import digit_captions
from mup_dit.building import FAMILIES, ModelConfig, Network, build_skeleton, read_model_config
from mup_dit.conversion import CLASSES, from_diffusers
from mup_dit.parametrization import Init, Readout, Scaling, apply_table
from mup_dit.released import AUTO_SHAPES, SUFFIXES, infer_config, read_released
from mup_dit.saving import NULL_CAPTION_FILE, plain_names, readout_multipliers
from mup_dit.small_text import SmallTextEncoder

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
HUB_FILE = re.compile(r"([\w-][\w.-]*/[\w.-]+)/(.+\.(?:pt|pth|safetensors))")
HUB_PATTERNS = ["*.json", "*.safetensors", "transformer/*"]

logger = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """A model ready to be used, and what was stored with it.

    Attributes:
        model: in eval mode, on the device asked for.
        metadata: what is known besides: ``objective``, ``vae``, ``text`` (a name, or a small encoder's description).
        source: what was loaded, for reports.
    """

    model: Network
    config: ModelConfig
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = ""


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    *,
    use_ema: bool = True,
    heads: int | None = None,
    base_shapes: str | Path | None = None,
    output_mult: float | None = None,
) -> LoadedModel:
    """The model stored under a path or hub name; see the module's list of what is accepted.

    Args:
        use_ema: the moving average of the weights, where both are stored.
        heads: number of attention heads of a ``.pt`` or ``.pth``, which do not tell; checked wherever it is known.
        base_shapes: ``.bsh`` file (or ``auto``: 4 heads) of a ``.pt`` or ``.pth`` trained by muP.
        output_mult: of such a file; None: stored, or 1.

    Raises: CheckpointError if nothing loadable is there, a file is damaged, its tensors fit another model (all are
        named), or muP weights come without base shapes; ConfigError for heads that do not fit.
    """
    name = str(path)
    where = _find(name)
    if where.is_file() and where.suffix in SUFFIXES:
        shapes = None if base_shapes is None else str(base_shapes)
        loaded = _load_released(where, use_ema=use_ema, heads=heads, base_shapes=shapes, output_mult=output_mult)
    else:
        loaded = _load_described(where, name, use_ema)
    own = loaded.config.network.num_heads
    if heads is not None and heads != own:
        raise ConfigError(f"heads={heads}, but {name} has {own}; leave the option out.")
    return replace(loaded, model=loaded.model.eval().to(device), source=name)


def load_weights_into(model: Network, path: str | Path, config: ModelConfig, *, use_ema: bool = True) -> None:
    """Copies stored weights into ``model``, which keeps its own table; the function stays what it was.

    A checkpoint whose readout has another multiplier is rescaled: ``W <- W mult_stored / mult_own``.

    Raises: CheckpointError if the checkpoint is of another kind or size, naming the tensors.
    """
    shapes = config.base_shapes or (AUTO_SHAPES if config.parametrization != "sp" else None)
    try:
        loaded = load_model(path, use_ema=use_ema, heads=config.network.num_heads, base_shapes=shapes)
    except ConfigError as error:
        # what is called heads there is a part of the network's shape here
        reason = str(error).replace("heads=", "model.num_heads=").replace("leave the option out", "train at its width")
        raise CheckpointError(f"init_from={path}: {reason}") from None
    if loaded.config.family != config.family:
        raise CheckpointError(f"init_from={path} is a {loaded.config.family}, but model.family={config.family}.")
    theirs, ours = loaded.model.state_dict(), readout_multipliers(model)
    for name, mult in readout_multipliers(loaded.model).items():
        if name in ours:
            theirs[f"{name}.weight"] = theirs[f"{name}.weight"] * (mult / ours[name])
    load_state(model, theirs, f"init_from={path}")


def load_state(model: Network, state: Mapping[str, Tensor], source: str) -> None:
    """Copies a state dict into the model.

    PixArt's position table is computed, so that one of another size in an old checkpoint is no obstacle.

    Raises: CheckpointError that names tensors which are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    state = plain_names(state)
    if "pos_embed" in own and model.config.__class__.__name__ == "PixArtConfig":
        state["pos_embed"] = own["pos_embed"]
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in own]
    problems += [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        network = model.config
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise CheckpointError(
            f"{source} does not fit a network of width {network.hidden_size}, {network.num_heads} heads, depth "
            f"{network.depth}, patches of {network.patch_size}: {'; '.join(problems[:6])}{more}. Checkpoints belong to "
            "one size; set model.* to that of the checkpoint."
        )
    model.load_state_dict(state, strict=True)


# ---------------------------------------------------------------- where


def _find(name: str) -> Path:
    path = Path(name).expanduser()
    if path.exists():
        return _inside(path) if path.is_dir() else path
    in_hub = HUB_FILE.fullmatch(name)
    if name.startswith((".", "/", "~")) or not (in_hub or HUB_NAME.fullmatch(name)):
        raise CheckpointError(
            f"model_path={name} does not exist; give a run folder, a model folder, a .pt or .pth file, or a hub name."
        )
    if not in_hub and Path(name).suffix in (*SUFFIXES, ".safetensors"):
        raise CheckpointError(f"model_path={name} does not exist; give the path of the file.")
    return _download(in_hub[1], in_hub[2]) if in_hub else _inside(_download(name, None))


def _inside(folder: Path) -> Path:
    """The folder or file to be read for a folder."""
    if list_checkpoints(folder) or any((folder / name).is_file() for name in (MANIFEST, MODEL_FILE)):
        return folder
    if (folder / CONFIG_FILE).is_file() and any(folder.glob("diffusion_pytorch_model*")):
        return folder
    for inner in ("transformer", "export"):
        if (folder / inner / CONFIG_FILE).is_file():
            return folder / inner
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(files) == 1:
        return files[0]
    if len(files) > 1:
        raise CheckpointError(f"{folder} holds {', '.join(path.name for path in files[:6])}; give the path of one.")
    if checkpoints_dir(folder).is_dir():
        raise CheckpointError(f"{folder} has no complete checkpoint yet; train at least one checkpoint interval.")
    present = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"model_path={folder} holds no model: {MODEL_FILE} with {CONFIG_FILE}, checkpoints/ of a run, transformer/ of "
        f"a pipeline, or a .pt or .pth file is needed; it has {present}."
    )


def _download(repository: str, file: str | None) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        if file is not None:
            return Path(hf_hub_download(repository, file))
        return Path(snapshot_download(repository, allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise CheckpointError(
            f"model_path={repository} is no local folder and could not be fetched from the hub "
            f"({type(error).__name__}: {lines[0][:160]}). Without hub access, copy the model here and give its path."
        ) from None


# ---------------------------------------------------------------- what


def _load_released(
    path: Path, *, use_ema: bool, heads: int | None, base_shapes: str | None, output_mult: float | None
) -> LoadedModel:
    released = read_released(path, use_ema=use_ema)
    config = infer_config(released, str(path), heads=heads, base_shapes=base_shapes, output_mult=output_mult)
    model = _empty(config)
    load_state(model, released.state, str(path))
    vae = released.options.get("vae")
    metadata = {"averaged": released.averaged, **({"vae": vae} if isinstance(vae, str) else {})}
    return LoadedModel(model, config, metadata)


def _empty(config: ModelConfig) -> Network:
    model = build_skeleton(config).to_empty(device="cpu")
    model.reset_tables(torch.Generator().manual_seed(0))
    return model


def _load_described(where: Path, name: str, use_ema: bool) -> LoadedModel:
    if where.is_file():
        if where.suffix != ".safetensors":
            raise CheckpointError(f"model_path={where} is no model file; .safetensors, .pt and .pth load.")
        weights, folder = where, where.parent
    else:
        weights, folder = where / MODEL_FILE, where
    if list_checkpoints(folder) or (folder / MANIFEST).is_file():
        return _load_run(folder, use_ema)
    described = _read_json(folder / CONFIG_FILE)
    if described.get("_class_name") in CLASSES:
        return _load_diffusers(folder, described["_class_name"])
    if "model" not in described:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} describes {described.get('_class_name', 'no model that is known')}; our own "
            f"exports load, and diffusers' {', '.join(CLASSES)}."
        )
    return _load_export(weights, described)


def _load_run(folder: Path, use_ema: bool) -> LoadedModel:
    state, run = load_weights(folder, ema=use_ema)
    config = read_model_config(run["model"])
    model = _empty(config)
    load_state(model, state, str(folder))
    data = run.get("data") or {}
    text = data.get("text")
    if text == "small" and str(data.get("train", "")).startswith("digits"):
        text = SmallTextEncoder.train(digit_captions()).to_dict()
    metadata = {"objective": run.get("objective"), "vae": data.get("vae"), "text": text, "seed": run.get("seed")}
    return LoadedModel(model, config, {key: value for key, value in metadata.items() if value is not None})


def _load_export(weights: Path, described: Mapping[str, Any]) -> LoadedModel:
    """The stored table is used as it is: neither a base-shape file nor the base's size is needed."""
    config = read_model_config(described["model"])
    kind = FAMILIES[config.family][0]
    with torch.device("meta"):
        model = kind(config.network)
    model = model.to_empty(device="cpu")
    model.reset_tables(torch.Generator().manual_seed(0))
    table = described.get("table")
    if table:
        apply_table(model, read_table(table, str(weights)))
    readouts = described.get("readouts") or {}
    for name, module in model.named_modules():
        if isinstance(module, Readout):
            if name not in readouts:
                raise CheckpointError(
                    f"{weights.parent / CONFIG_FILE} lacks the multiplier of {name} under readouts; export the model "
                    "again."
                )
            module.mult = float(readouts[name])
    load_state(model, read_weights(weights), str(weights))
    kept = {key: value for key, value in described.items() if key not in ("model", "table", "readouts", "format")}
    return LoadedModel(model, config, kept)


def read_table(rows: Any, source: str) -> tuple[Scaling, ...]:
    """The inverse of ``parametrization.plain_table``.

    Raises: CheckpointError for rows that lack something.
    """
    try:
        return tuple(
            Scaling(
                name=row["name"],
                shape=tuple(row["shape"]),
                base_shape=tuple(row["base_shape"]),
                ninf=row["ninf"],
                width_mult=row["width_mult"],
                kind=row["kind"],
                init=Init(row["init"], row["init_std"]),
                lr_mult=row["lr_mult"],
                weight_decay_mult=row["weight_decay_mult"],
                forward_mult=row["forward_mult"],
            )
            for row in rows
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{source}: the table in {CONFIG_FILE} is incomplete ({error}); export again.") from None


def _load_diffusers(folder: Path, class_name: str) -> LoadedModel:
    import diffusers

    safetensors = True if any(folder.glob("*.safetensors")) else None
    try:
        theirs = getattr(diffusers, class_name).from_pretrained(
            str(folder), use_safetensors=safetensors, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise CheckpointError(f"{folder} is no readable folder of diffusers ({lines[0][:200]}).") from None
    path, null_TY = folder / NULL_CAPTION_FILE, None
    if path.is_file():
        null_TY = read_weights(path)["y_embedding"]
    elif CLASSES[class_name] == "pixart":
        logger.warning("%s has no null caption (it is zero now); for guidance encode an empty text.", folder)
    model, config = from_diffusers(theirs, null_TY)
    return LoadedModel(model, config)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the weights beside it need their configuration.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable JSON ({error}); copy it again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a configuration is needed.")
    return content
