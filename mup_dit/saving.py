"""Models to disk: safetensors with a config.json that holds the table of multipliers, diffusers' folders, ``.pt``.

A folder or file appears whole or not at all, and nothing is replaced unless that is asked for.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import provenance
from common.checkpoint import CONFIG_FILE, MODEL_FILE, export_weights, save_weights
from common.errors import CheckpointError
from common.folders import require_replaceable, write_folder
from mup_dit.base_shapes import write_base_shapes
from mup_dit.building import ModelConfig, Network, describe, flat_options
from mup_dit.conversion import to_diffusers
from mup_dit.parametrization import Readout
from mup_dit.pixart import PixArt
from mup_dit.released import PREFIXES

FORMAT = 1
NULL_CAPTION_FILE = "null_caption.safetensors"  # beside diffusers' PixArt, which has no place for it
BASE_SHAPES_FILE = "base_shapes.bsh"


def save_model(
    folder: Path | str,
    model: nn.Module,
    config: ModelConfig,
    *,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes ``model.safetensors``, ``config.json`` and a model card; ``load_model`` reads the folder.

    config.json holds the options under ``model``, the table of the parametrisation under ``table`` and the readouts'
    multipliers under ``readouts``, so that no base-shape file is needed again.

    Args:
        model: wrapped or not; its weights are written as they are.
        metadata: what else should travel with it: ``objective``, ``vae``, ``text``, ``seed``, ``step``.
        overwrite: replace a model that is there.

    Raises: CheckpointError if a model is there already, or the disk is full.
    """
    state = plain_names(model.state_dict())
    described = {
        "format": FORMAT,
        **provenance.collect(),
        **(metadata or {}),
        "model": flat_options(config),
        "readouts": readout_multipliers(model),
        "table": describe(model),
    }
    card = model_card(config, described, state)
    return replace_model(folder, lambda target: export_weights(target, state, described, card), overwrite)


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what wrappers put before a name."""
    return {PREFIXES.sub("", name): value for name, value in state.items()}


def readout_multipliers(model: nn.Module) -> dict[str, float]:
    """Name of each readout -> factor on its input."""
    return {
        PREFIXES.sub("", name): module.mult for name, module in model.named_modules() if isinstance(module, Readout)
    }


def save_diffusers(folder: Path | str, model: Network, *, overwrite: bool = False) -> Path:
    """Writes a folder that diffusers' ``from_pretrained`` loads, in the model's dtype, the multipliers folded in.

    Raises: ConfigError for options that diffusers does not have; CheckpointError as ``save_model``.
    """
    theirs, dtype = to_diffusers(model), next(model.parameters()).dtype
    if dtype != torch.float32:
        theirs = theirs.to(dtype)

    def write(target: Path) -> None:
        theirs.save_pretrained(str(target), safe_serialization=True)
        if isinstance(model, PixArt):
            save_weights(target / NULL_CAPTION_FILE, {"y_embedding": model.y_embedder.y_embedding})

    return replace_model(folder, write, overwrite)


def save_reference(
    folder: Path | str, model: nn.Module, config: ModelConfig, *, overwrite: bool = False, folded: bool = True
) -> Path:
    """Writes ``model.pt`` (DiT) or ``model.pth`` (PixArt-alpha) as the reference implementations load them.

    Args:
        folded: the multiplier goes into the weight, and the ordinary class loads it; False: the muP class does, with
            the base shapes that are written beside it.

    Raises: CheckpointError for MMDiT, which has no reference, and as ``save_model``.
    """
    if config.family == "mmdit":
        raise CheckpointError("to=reference: there is no released implementation of MMDiT; use to=diffusers.")
    state = {name: value.detach().cpu().clone() for name, value in plain_names(model.state_dict()).items()}
    if folded:
        for name, mult in readout_multipliers(model).items():
            state[f"{name}.weight"] *= mult

    def write(target: Path) -> None:
        if config.family == "pixart":
            torch.save({"state_dict": state}, target / "model.pth")
        else:
            torch.save(state, target / "model.pt")
        if not folded and model.scalings:
            shapes = {row.name: row.base_shape for row in model.scalings.values()}
            write_base_shapes(target / BASE_SHAPES_FILE, shapes)

    return replace_model(folder, write, overwrite)


def replace_model(folder: Path | str, write: Callable[[Path], object], overwrite: bool) -> Path:
    """``write_folder`` behind ``check_output``."""
    check_output(Path(folder), overwrite)
    return write_folder(Path(folder), write)


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises CheckpointError if ``folder`` holds something that must not be replaced."""
    require_replaceable(folder, overwrite, ours=holds_weights(folder))


def holds_weights(folder: Path) -> bool:
    """Whether a model was written into ``folder``."""
    names = (MODEL_FILE, "model.pt", "model.pth")
    return any((folder / name).is_file() for name in names) or (
        (folder / CONFIG_FILE).is_file() and any(folder.glob("diffusion_pytorch_model*"))
    )


def model_card(config: ModelConfig, described: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Text of ``README.md``."""
    network = config.network
    parameters = sum(value.numel() for name, value in state.items() if "pos_embed" not in name)
    name = {"dit": "DiT", "pixart": "PixArt-alpha", "mmdit": "MMDiT"}[config.family]
    law = {"mup": "muP", "mup_init": "the init of muP", "sp": "the standard parametrisation"}[config.parametrization]
    facts = {key: described[key] for key in ("git_revision", "seed", "step") if described.get(key) is not None}
    lines = [
        "---",
        "tags: [diffusion, mup]",
        "---",
        "",
        f"# {name}, width {network.hidden_size} ({parameters / 1e6:,.1f}M parameters)",
        "",
        f"{network.depth} blocks, {network.num_heads} heads of {network.head_size}, patches of {network.patch_size}, "
        f"latents {network.in_channels} x {network.input_size} x {network.input_size}; trained by {law} (arXiv "
        "2505.15270).",
        "",
        "```python",
        "from mup_dit.loading import load_model",
        'loaded = load_model("path/of/this/folder")  # .model, .config, .metadata',
        "```",
        "",
        "The readout's input is multiplied by the number under `readouts` in `config.json`; "
        "`python -m mup_dit.export to=diffusers` folds it into the weights.",
        "",
        "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in facts.items()),
        "",
    ]
    return "\n".join(lines)
