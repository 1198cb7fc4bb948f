"""Baselines to disk and back: a folder as ``rpg/saving.py`` writes it, and the released file of two state dicts.

model.safetensors   ``diffusion.net.*``, ``vae.*``, ``latent.*``, as far as the kind has them
config.json         kind and options (``model``), number of values, data, revision, seed
codec/              structure of the networks and their normalisation
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import provenance
from common.checkpoint import CONFIG_FILE, MODEL_FILE, export_weights, read_weights, sha256, write_json
from common.errors import CheckpointError
from common.folders import write_folder
from rpg.codec import TokenCodec
from rpg.pdiff import PdiffConfig, PdiffModel, read_pdiff_config
from rpg.saving import CODEC_FOLDER, check_output

FAMILY, FORMAT = "pdiff", 1
EXPORT_FOLDER = "export"
ALIASES = ("diffusion_trainer.", "diffusion_sampler.")  # of the released file: the denoiser and tables once more


@dataclass(frozen=True)
class LoadedPdiff:
    """A baseline ready to draw networks.

    Attributes:
        model: in eval mode, without gradients.
        tag: what generated files are called after.
        tester: options ``data.tester`` of the run.
        digest: sha256 of the weights and the codec.
    """

    model: PdiffModel
    codec: TokenCodec
    tag: str
    tester: Mapping[str, Any] | None
    adapter_config: Mapping[str, Any] | None
    metadata: Mapping[str, Any]
    digest: str


def save_pdiff(
    folder: Path | str,
    model: PdiffModel,
    codec: TokenCodec,
    *,
    tag: str,
    data: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a folder that ``load_pdiff`` reads.

    Args:
        data: facts on the data, among them ``tester`` and ``adapter_config``.
        metadata: what else should travel with it: ``seed``, ``step``, ``run``.

    Raises: CheckpointError if something is there already, or the disk is full.
    """
    folder = Path(folder)
    check_output(folder, overwrite)
    described = {
        "format": FORMAT,
        "family": FAMILY,
        **provenance.collect(),
        **(metadata or {}),
        "model": model.config.options(),
        "num_values": model.num_values,
        "data": {"tag": tag, **json.loads(json.dumps(data or {}, default=str))},
    }

    def write(target: Path) -> None:
        export_weights(target, model.state_dict(), described, _card(model, codec, tag))
        codec.to_folder(target / CODEC_FOLDER)
        digest = hashlib.sha256(sha256(target / MODEL_FILE).encode())
        for path in sorted((target / CODEC_FOLDER).iterdir()):
            digest.update(f"{path.name} {sha256(path)}".encode())
        write_json(target / CONFIG_FILE, described | {"generator_sha256": digest.hexdigest()})

    return write_folder(folder, write)


def load_pdiff(path: Path | str, device: torch.device | str = "cpu") -> LoadedPdiff:
    """The baseline of a run folder that has ended, or of an exported folder.

    Raises: CheckpointError if there is none, or a file is damaged or does not fit.
    """
    path = Path(path)
    folder = path / EXPORT_FOLDER if (path / EXPORT_FOLDER / CONFIG_FILE).is_file() else path
    try:
        described = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if described.get("family") != FAMILY:
            raise CheckpointError(
                f"generator={path} is no p-diff baseline; python -m rpg.generate reads the generators of rpg.train."
            )
        config, num_values, data = read_pdiff_config(described["model"]), described["num_values"], described["data"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"generator={path} holds no baseline ({type(error).__name__}: {error}); give the folder of a run of "
            "python -m rpg.train_pdiff that has ended."
        ) from None
    model = PdiffModel(num_values, config)
    load_state(model, read_weights(folder / MODEL_FILE), str(folder))
    return LoadedPdiff(
        model.eval().requires_grad_(False).to(device),
        TokenCodec.from_folder(folder / CODEC_FOLDER),
        data["tag"],
        data.get("tester"),
        data.get("adapter_config"),
        {name: value for name, value in described.items() if name not in ("model", "data", "format")},
        described["generator_sha256"],
    )


def load_state(model: PdiffModel, state: Mapping[str, Tensor], source: str) -> None:
    """Raises CheckpointError unless the tensors are exactly the model's."""
    own = model.state_dict()
    problems = sorted(own.keys() ^ state.keys()) or [
        f"{name} ({tuple(state[name].shape)} instead of {tuple(value.shape)})"
        for name, value in own.items()
        if state[name].shape != value.shape
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit its configuration: {', '.join(problems[:5])}; export it again.")
    model.load_state_dict(state, strict=True)


def read_released(path: Path | str, num_values: int, config: PdiffConfig) -> PdiffModel:
    """A model from a released-layout ``.pth``: a state dict of the denoiser, of the autoencoder, or a mapping of both,
    ``{"diffusion": ..., "vae": ...}``. Copies of the denoiser under other names are verified and dropped.

    Raises: CheckpointError if it is not that, or does not fit ``config``.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, torch.serialization.pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read as tensors ({str(error).splitlines()[0]}).") from None
    parts = loaded if config.kind == "pdiff_vae" else {"diffusion" if config.has_diffusion else "vae": loaded}
    state: dict[str, Tensor] = {}
    for part in ("diffusion", "vae"):
        tensors = dict(parts.get(part) or {})
        for name in [name for name in tensors if name.startswith(ALIASES)]:
            _, kind, rest = name.split(".", 2) if name.count(".") > 1 else (*name.split("."), "")
            copy = tensors.pop(name)
            if kind == "model" and not torch.equal(copy, tensors.get(f"net.{rest}", torch.empty(0))):
                raise CheckpointError(f"{path}: {name} and net.{rest} should be the same tensor, but differ.")
        state |= {f"{part}.{name}": value for name, value in tensors.items()}
    model = PdiffModel(num_values, config)
    if config.has_vae:  # released latents are not standardised
        state |= {f"latent.{name}": value for name, value in model.latent.state_dict().items()}
    load_state(model, state, str(path))
    return model.eval()


def _card(model: PdiffModel, codec: TokenCodec, tag: str) -> str:
    parameters = sum(value.numel() for value in model.parameters())
    return "\n".join(
        [
            "---",
            "tags: [diffusion, weight-generation]",
            "---",
            "",
            f"# Baseline {model.config.kind} of networks: {tag}",
            "",
            f"Draws state dicts of {codec.num_values:,} values, each as one vector (p-diff, arXiv 2402.13144), with "
            f"{parameters:,} parameters.",
            "",
            "```bash",
            "python -m rpg.generate_pdiff generator=path/of/this/folder num_generated=10 output=networks",
            "```",
            "",
        ]
    )
