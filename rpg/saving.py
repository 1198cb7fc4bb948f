"""Generators to disk: weights, configuration, codec and what the data said, in one folder that needs no data.

    model.safetensors   the generator's tensors under the released names, each once
    config.json         options of the network (``model``), facts about the data (``data``), revision, seed, step
    codec/              structure of the networks and their normalisation
    README.md           a model card

A folder appears whole or not at all, and none is replaced unless that is asked for.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import provenance
from common.checkpoint import CONFIG_FILE, MODEL_FILE, export_weights, sha256, write_json
from common.errors import CheckpointError
from common.folders import require_replaceable, write_file, write_folder
from rpg.codec import TokenCodec
from rpg.data import GeneratorData
from rpg.model import Generator
from rpg.model_config import GeneratorConfig, flat_options
from rpg.released import WRAPPERS, add_aliases, drop_aliases
from rpg.tasks import task_of_vector

FORMAT = 1
CODEC_FOLDER = "codec"


@dataclass(frozen=True, kw_only=True)
class GeneratorFacts:
    """What a user of the generator must know about the data it was trained on.

    Attributes:
        tag: what generated files are called after.
        groups: names of the permutation states, in the order of the table; empty without states.
        states: ``auto``, or ``none`` if the table is there but was never trained.
        condition_kind: ``none``, ``class``, ``seed``, ``file``: option ``data.condition``.
        condition_dropout: share of training samples without their condition; guidance needs some.
        tasks: tasks of the checkpoints, if their conditions are class vectors.
        num_checkpoints: K.
        manifest_digest: of the checkpoints' names and contents.
        adapter_config: options of PEFT adapters, if the checkpoints were some.
        tester: options ``tester.*`` of the run.
    """

    tag: str = "generator"
    groups: tuple[str, ...] = ()
    states: str = "auto"
    condition_kind: str = "none"
    condition_dropout: float = 0.0
    tasks: tuple[int, ...] = ()
    num_checkpoints: int = 0
    manifest_digest: str | None = None
    adapter_config: Mapping[str, Any] | None = None
    tester: Mapping[str, Any] | None = None


def facts_of(data: GeneratorData, config: GeneratorConfig, *, condition_dropout: float = 0.0) -> GeneratorFacts:
    """What a generator of this configuration should remember of its training data."""
    section, kind = data.section, data.section.condition
    tasks: set[int] = set()
    if kind == "class" and data.condition_KC is not None:
        tasks = {task_of_vector(row) for row in data.condition_KC.unique(dim=0).tolist()}
    return GeneratorFacts(
        tag=section.name,
        groups=data.groups if config.num_states else (),
        condition_kind=kind if config.condition != "none" else "none",
        condition_dropout=condition_dropout,
        tasks=tuple(sorted(tasks)),
        num_checkpoints=len(data.names),
        manifest_digest=data.manifest.digest,
        adapter_config=data.adapter_config,
        tester=asdict(section.tester) if section.tester.kind != "none" else None,
    )


def save_generator(
    folder: Path | str,
    model: Generator,
    codec: TokenCodec,
    facts: GeneratorFacts,
    metadata: Mapping[str, Any] | None = None,
    *,
    state: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a folder that ``load_generator`` reads.

    Args:
        model: not wrapped (its configuration is read), whatever wraps the names of ``state``.
        metadata: what else should travel with it: ``seed``, ``step``, ``run``, ``sampling`` (the sampler's options).
        state: weights to write instead of the model's own, e.g. their moving average.
        overwrite: replace a generator that is there.

    Raises: CheckpointError if something is there already, or the disk is full.
    """
    folder = Path(folder)
    check_output(folder, overwrite)
    tensors = plain_state(model.state_dict() if state is None else state)

    def write(target: Path) -> None:
        described = describe(model.config, facts, metadata)
        export_weights(target, tensors, described, model_card(model.config, codec, facts, described))
        codec.to_folder(target / CODEC_FOLDER)
        digest = hashlib.sha256(sha256(target / MODEL_FILE).encode())
        for path in sorted((target / CODEC_FOLDER).iterdir()):
            digest.update(f"{path.name} {sha256(path)}".encode())
        write_json(target / CONFIG_FILE, described | {"generator_sha256": digest.hexdigest()})

    return write_folder(folder, write)


def describe(
    config: GeneratorConfig, facts: GeneratorFacts, metadata: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Contents of ``config.json``."""
    data = json.loads(json.dumps(asdict(facts), default=str))
    return {"format": FORMAT, **provenance.collect(), **(metadata or {}), "model": flat_options(config), "data": data}


def plain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their released names, each once, without what wrappers put before a name."""
    return drop_aliases({WRAPPERS.sub("", name): value for name, value in state.items()})


def save_reference(path: Path | str, model: Generator, *, sampler: str = "ddpm", overwrite: bool = False) -> Path:
    """Writes a ``.pth`` in the reference's layout: all names of the denoiser and the tables of the diffusion.

    The reference knows neither of our other predictions and norms nor the corrected attention.

    Args:
        sampler: ``ddpm`` or ``ddim``: whose table the file holds; the reference's class must be configured likewise.

    Raises: CheckpointError if the file exists, or the generator has options that the reference does not have.
    """
    path, config = Path(path), model.config
    if path.exists() and not overwrite:
        raise CheckpointError(f"output={path} exists; choose another name, or replace it with overwrite=true.")
    unknown = [
        f"model.{name}={getattr(config, name)}"
        for name, theirs in (("prediction", "noise"), ("norm", "batch"))
        if config.head == "diffusion" and getattr(config, name) != theirs
    ]
    if config.stack == "transformer" and config.attention != "released":
        unknown.append(f"model.attention={config.attention}")
    if unknown:
        raise CheckpointError(f"to=reference: the reference has no {', '.join(unknown)}; use to=quintet.")
    state = {name: value.detach().cpu().contiguous() for name, value in plain_state(model.state_dict()).items()}
    stored = add_aliases(
        state, beta=config.beta, steps=config.diffusion_steps, sampler=sampler
    )  # one storage under three names is stored once
    return write_file(path, lambda temporary: torch.save(stored, temporary))


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises CheckpointError if ``folder`` holds something that must not be replaced."""
    ours = (folder / MODEL_FILE).is_file() and (folder / CODEC_FOLDER).is_dir()
    require_replaceable(folder, overwrite, ours=ours, what="a generator")


def model_card(config: GeneratorConfig, codec: TokenCodec, facts: GeneratorFacts, described: Mapping[str, Any]) -> str:
    """Text of ``README.md``."""
    known = {key: described[key] for key in ("git_revision", "seed", "step") if described.get(key) is not None}
    return "\n".join(
        [
            "---",
            "tags: [diffusion, weight-generation]",
            "---",
            "",
            f"# Generator of networks: {facts.tag}",
            "",
            f"Draws state dicts of {codec.num_values:,} values ({config.num_tokens} tokens of {config.dim_per_token}) "
            f"by recurrent diffusion (arXiv 2501.11587): {config.stack} stack of width {config.d_model}, {config.head} "
            f"head, condition {config.condition}, {config.num_states} permutation states; trained on "
            f"{facts.num_checkpoints} checkpoints.",
            "",
            "```bash",
            "python -m rpg.generate generator=path/of/this/folder num_generated=10 output=networks",
            "```",
            "",
            "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in known.items()),
            "",
        ]
    )
