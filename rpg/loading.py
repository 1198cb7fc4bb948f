"""Generators from disk: a run, an exported folder, or a released ``.pth`` with its ``structure.cache``.

The networks' structure comes with the generator, so no checkpoints are needed. Nothing is executed: pickled files are
read tensors only.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoint import CONFIG_FILE, MODEL_FILE, checkpoints_dir, load_weights, read_weights, sha256
from common.conversion import from_config
from common.errors import CheckpointError
from rpg.codec import TokenCodec
from rpg.model import Generator
from rpg.model_config import GeneratorConfig, read_generator_config
from rpg.noise_schedule import TokenDiffusion, linear_tables
from rpg.positions import token_positions
from rpg.released import STATE_KEY, SUFFIXES, drop_aliases, read_released, read_sizes
from rpg.sampling import SamplerConfig
from rpg.saving import CODEC_FOLDER, FORMAT, GeneratorFacts, plain_state
from rpg.structure_cache import read_structure_cache
from rpg.tasks import task_in_name

EXPORT_FOLDER = "export"  # of a run that has ended
DESCRIPTION_FOLDER = "generator"  # of a run that has begun: all but the weights
STRUCTURE_CACHE = "structure.cache"  # of the reference, beside a released file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedGenerator:
    """A generator ready to draw networks.

    Attributes:
        model: in eval mode, without gradients, on the device asked for.
        codec: tokens <-> state dicts.
        metadata: ``seed``, ``step``, ``git_revision``, ...
        digest: sha256 that identifies weights and codec.
        source: what was loaded, for reports.
    """

    model: Generator
    codec: TokenCodec
    facts: GeneratorFacts
    metadata: Mapping[str, Any]
    digest: str
    source: str

    @property
    def config(self) -> GeneratorConfig:
        return self.model.config

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the permutation states; empty if there are none, or they were never trained."""
        return self.facts.groups if self.facts.states != "none" else ()

    @property
    def condition_kind(self) -> str:
        return self.facts.condition_kind

    @property
    def sampler(self) -> SamplerConfig:
        """How networks are drawn unless something else is asked for: the run's sampler, or the default one."""
        return from_config(SamplerConfig, self.metadata.get("sampling") or {}, "sampling")

    @property
    def normalisation(self) -> str:
        return self.codec.structure.normalisation

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_generator(
    path: Path | str,
    device: torch.device | str = "cpu",
    *,
    use_ema: bool = True,
    structure: Path | str | None = None,
    num_heads: int | None = None,
) -> LoadedGenerator:
    """The generator of a run folder (its export; before the run has ended, its newest checkpoint), an exported folder,
    or a released ``.pth``.

    Args:
        use_ema: the averaged weights where a run has both; an export holds one of them.
        structure: of a released file: the reference's ``structure.cache`` or a folder with a codec; None: a file of
            that name beside it.
        num_heads: of a released transformer.

    Raises: CheckpointError if nothing loadable is there or a file is damaged or does not fit, naming it.
    """
    path = Path(path)
    if path.is_file():
        if path.name == MODEL_FILE:
            path = path.parent
        else:
            return _load_released(path, device, structure, num_heads)
    if not path.exists():
        raise CheckpointError(
            f"generator={path} does not exist; give a run folder, an exported folder or a released .pth file."
        )
    if (path / EXPORT_FOLDER / MODEL_FILE).is_file():
        path = path / EXPORT_FOLDER
    if (path / MODEL_FILE).is_file() and (path / CODEC_FOLDER).is_dir():
        return _load_folder(path, path, read_weights(path / MODEL_FILE), device)
    if (path / DESCRIPTION_FOLDER / CONFIG_FILE).is_file():
        state, _ = load_weights(path, ema=use_ema)
        return _load_folder(path, path / DESCRIPTION_FOLDER, state, device)
    files = [file for suffix in SUFFIXES for file in sorted(path.glob(f"*{suffix}"))]
    if len(files) == 1:
        return _load_released(files[0], device, structure, num_heads)
    if checkpoints_dir(path).is_dir():
        raise CheckpointError(f"generator={path} has no {EXPORT_FOLDER}/ yet; let the run end, or resume it.")
    present = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"generator={path} holds no generator: {EXPORT_FOLDER}/ of a run, {MODEL_FILE} with {CODEC_FOLDER}/, or one "
        f"released .pth is needed; it has {present}."
    )


def _load_folder(
    source: Path, description: Path, state: Mapping[str, Tensor], device: torch.device | str
) -> LoadedGenerator:
    described = _read_config(description / CONFIG_FILE)
    if described.get("family") == "pdiff":
        raise CheckpointError(
            f"generator={source} is a p-diff baseline, not RPG; draw from it by python -m rpg.generate_pdiff "
            f"generator={source}."
        )
    config = read_generator_config(described["model"])
    facts = _read_facts(described["data"])
    codec = TokenCodec.from_folder(description / CODEC_FOLDER)
    _check_codec(config, codec, str(source))
    model = build_empty(config)
    load_state(model, plain_state(state), str(source))
    metadata = {key: value for key, value in described.items() if key not in ("model", "data", "format")}
    digest = metadata.pop("generator_sha256", None) or _digest_of(state)
    return LoadedGenerator(_ready(model, device), codec, facts, metadata, digest, str(source))


def _load_released(
    path: Path, device: torch.device | str, structure: Path | str | None, num_heads: int | None
) -> LoadedGenerator:
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"generator={path} is no generator file; {', '.join(SUFFIXES)} load, and folders.")
    full = read_released(path)
    sizes = read_sizes(full, str(path), num_heads=num_heads)
    config = GeneratorConfig(**sizes)
    where = path.parent / STRUCTURE_CACHE if structure is None else Path(structure)
    codec, names = read_codec(where, config)
    _check_codec(config, codec, str(path))
    state = drop_aliases(full, str(path))
    config = replace(config, **_positions_of(state["model.pe"][0], codec))
    model = build_empty(config)
    load_state(model, state, str(path))
    is_conditional = config.condition in ("gated", "full")
    rows = model.config.num_states
    facts = GeneratorFacts(
        tag=path.stem,
        # the reference has one state per checkpoint
        groups=names if len(names) == rows else tuple(str(row) for row in range(rows)),
        # class-conditional models carry a table that their training never read
        states="none" if is_conditional else "auto",
        condition_kind="class" if is_conditional else "none" if config.condition == "none" else "file",
        tasks=tuple(sorted({task for name in names if (task := task_in_name(name)) is not None})),
        num_checkpoints=len(names),
    )
    return LoadedGenerator(_ready(model, device), codec, facts, {"released": path.name}, sha256(path), str(path))


def read_codec(path: Path, config: GeneratorConfig) -> tuple[TokenCodec, tuple[str, ...]]:
    """The codec of a released generator, and the names of the checkpoints that its structure was made from.

    Args:
        path: the reference's ``structure.cache``, or a folder with a codec of ours.

    Raises: CheckpointError if nothing is there.
    """
    if path.is_dir():
        return TokenCodec.from_folder(path), ()
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist; a released generator needs the structure of its networks: put the reference's "
            f"{STRUCTURE_CACHE} beside it, or give structure=FILE."
        )
    cache = read_structure_cache(path)
    # the file does not say how tensors were cut; the number of tokens does
    codecs = [TokenCodec(cache.structure, config.dim_per_token, granularity) for granularity in (1, 2, 0)]
    fitting = [codec for codec in codecs if codec.num_tokens == config.num_tokens]
    return (fitting or codecs)[0], cache.checkpoint_names


def _positions_of(pe_LM: Tensor, codec: TokenCodec) -> dict[str, Any]:
    """Which table the stored one is; one that is none of them was trained."""
    for kind in ("2d", "1d", "none"):
        if kind == "2d" and pe_LM.shape[1] % 4:
            continue
        if torch.allclose(token_positions(codec, kind, pe_LM.shape[1]), pe_LM.float(), atol=1e-4):
            return {"positions": kind}
    return {"trainable_positions": True}


def _check_codec(config: GeneratorConfig, codec: TokenCodec, source: str) -> None:
    if (config.num_tokens, config.dim_per_token) != (codec.num_tokens, codec.dim):
        raise CheckpointError(
            f"{source} generates {config.num_tokens} tokens of {config.dim_per_token}, but its networks have "
            f"{codec.num_tokens} of {codec.dim}; give the structure that belongs to it."
        )


# ---------------------------------------------------------------- weights


def build_empty(config: GeneratorConfig) -> Generator:
    """A generator whose tensors hold no memory yet; ``load_state`` gives it some."""
    with torch.device("meta"):
        return Generator(config, torch.empty(config.num_tokens, config.d_model))


def load_state(model: Generator, state: Mapping[str, Tensor], source: str) -> None:
    """Puts tensors into a generator; its table of permutation states takes the size that the file has.

    Args:
        state: under the released names; copies of the denoiser and tables may be among them.

    Raises: CheckpointError that names tensors which are missing, unexpected or of another shape.
    """
    state = drop_aliases(state, source)
    rows = state[STATE_KEY].shape[0] if STATE_KEY in state else 0
    if rows and rows != model.config.num_states:
        model.config = replace(model.config, num_states=rows)
        with torch.device("meta"):
            model.to_permutation_state = nn.Embedding(rows, model.config.d_model)
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in own]
    problems += [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise CheckpointError(
            f"{source} does not fit this generator ({model.config.stack}, width {model.config.d_model}, "
            f"{model.config.num_tokens} tokens of {model.config.dim_per_token}): {'; '.join(problems[:6])}{more}."
        )
    dtypes = {name: value.dtype for name, value in own.items()}
    model.load_state_dict({name: state[name].to(dtypes[name]) for name in own}, strict=True, assign=True)
    if model.config.head == "diffusion":  # its tables are in no file
        config = model.config
        model.diffusion = TokenDiffusion(
            linear_tables(*config.beta, config.diffusion_steps),
            prediction=config.prediction,
            min_snr_gamma=config.min_snr_gamma,
        )


def _ready(model: Generator, device: torch.device | str) -> Generator:
    return model.eval().requires_grad_(False).to(device)


def _digest_of(state: Mapping[str, Tensor]) -> str:
    """For weights that have no file of their own."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---------------------------------------------------------------- descriptions


def _read_config(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        version = described["format"]
        if not isinstance(described["model"], dict) or not isinstance(described["data"], dict):
            raise ValueError("its parts are no objects")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing; the weights beside it need it. Export the generator again."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not describe a generator ({type(error).__name__}: {error}).") from None
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}, but this program reads {FORMAT}; update it.")
    return described


def _read_facts(values: Mapping[str, Any]) -> GeneratorFacts:
    known = {field.name for field in fields(GeneratorFacts)}
    chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return GeneratorFacts(**{name: value for name, value in chosen.items() if name in known})
