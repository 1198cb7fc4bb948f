"""A folder of checkpoints as training data of a generator: tokens, permutation groups, conditions.

Dimensions: K checkpoints, C numbers of a condition.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common.config import require_at_least, require_choice
from common.errors import ConfigError, DataError
from rpg.codec import GRANULARITIES, TokenCodec
from rpg.manifest import Manifest
from rpg.store import TokenStore
from rpg.structure import NORMALISATIONS
from rpg.tasks import class_vectors
from rpg.testing import TesterSection
from rpg.token_cache import Selection, load_or_build

GROUPS = ("auto", "file", "none", "seed", "class", "folder")
CONDITIONS = ("none", "class", "seed", "file")
CACHE_SUFFIX = ".rpg"
ONE_GROUP = "all"


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Options ``data.*``."""

    name: str = "checkpoints"  # what is generated, in reports and file names
    checkpoints: str | None = None  # folder of .pth or .safetensors files, or of PEFT adapters' folders
    cache_dir: str | None = None  # manifest, statistics and tokens; null: beside the folder, "<folder>.rpg"
    dim_per_token: int = 8192  # values per token; larger: fewer tokens, a larger generator
    granularity: int = 1  # 0 all tensors as one vector | 1 per tensor | 2 per rows of a tensor
    normalisation: Literal["layer", "residual"] = "layer"  # residual: only what differs between checkpoints is learned
    groups: Literal["auto", "file", "none", "seed", "class", "folder"] = "auto"
    # checkpoints of one group share a permutation state. auto: the seedNNNN of file names, else sub-folders, else one
    # group; file: each checkpoint is its own (the reference's 'auto'); none: no states
    condition: Literal["none", "class", "seed", "file"] = (
        "none"  # of names classNNNN or seedNNNN, or of conditions_file
    )
    conditions_file: str | None = None  # JSON {relative file name: [numbers]}, e.g. features of images or texts
    pattern: str | None = None  # glob of relative paths, e.g. '*seed000[0-2]*'; null: all
    limit: int | None = None  # the first so many in sorted order; null: all
    fill_value: float = float("nan")  # of the padding; NaN is left out of the loss
    num_workers: int = 0  # processes that read tokens beside training
    tester: TesterSection = field(default_factory=TesterSection)  # how generated networks are tested

    def __post_init__(self) -> None:
        require_at_least("data.dim_per_token", self.dim_per_token, 1)
        require_choice("data.granularity", self.granularity, GRANULARITIES)
        require_choice("data.normalisation", self.normalisation, NORMALISATIONS)
        require_choice("data.groups", self.groups, GROUPS)
        require_choice("data.condition", self.condition, CONDITIONS)
        require_at_least("data.num_workers", self.num_workers, 0)
        if self.limit is not None:
            require_at_least("data.limit", self.limit, 1)
        if (self.condition == "file") != (self.conditions_file is not None):
            raise ConfigError(
                f"data.condition={self.condition} and data.conditions_file={self.conditions_file} do not fit; set both "
                "(data.condition=file data.conditions_file=FILE.json) or neither."
            )
        if self.normalisation == "residual" and not np.isnan(self.fill_value) and self.fill_value != 0:
            raise ConfigError(f"data.fill_value={self.fill_value} must be nan or 0 with data.normalisation=residual.")

    @property
    def folder(self) -> Path | None:
        return Path(self.checkpoints).expanduser() if self.checkpoints else None

    def selection(self) -> Selection:
        """Which files are meant, and where their cache lies.

        Raises: ConfigError if neither a folder nor a cache is named.
        """
        if self.folder is None and self.cache_dir is None:
            raise ConfigError("data.checkpoints is not set; give the folder that holds the checkpoints.")
        if self.cache_dir is not None:
            cache = Path(self.cache_dir).expanduser()
        else:
            cache = self.folder.parent / (self.folder.name + CACHE_SUFFIX)
        return Selection(self.folder, cache, self.pattern, self.limit)


@dataclass(frozen=True)
class GeneratorData:
    """Everything that a generator learns from.

    Attributes:
        tokens: of K checkpoints; of none in generation-only mode.
        group_K: index into ``groups``, the permutation state of each checkpoint.
        condition_KC: float32, or None without conditions.
        names: relative file names in the order of ``tokens``.
        adapter_config: of PEFT adapters; None for plain state dicts.
    """

    codec: TokenCodec
    tokens: TokenStore
    group_K: Tensor
    groups: tuple[str, ...]
    condition_KC: Tensor | None
    names: tuple[str, ...]
    manifest: Manifest
    section: DataSection
    adapter_config: Mapping[str, object] | None = None

    @property
    def generation_only(self) -> bool:
        """Whether there are no tokens to train on."""
        return len(self.tokens) == 0

    def require_tokens(self) -> None:
        """Raises DataError in generation-only mode."""
        if self.generation_only:
            raise DataError(
                f"data.checkpoints={self.section.checkpoints} holds no checkpoint to train on, only the structure of "
                "earlier ones is left; bring the checkpoints back."
            )


def build_data(section: DataSection) -> GeneratorData:
    """The data that ``section`` describes; statistics and tokens come from the cache if the checkpoints are the same.

    Raises:
        ConfigError: options that do not fit each other.
        DataError: no checkpoints, checkpoints that differ in keys or shapes or are not finite, names without the field
            that a group or condition needs.
        CheckpointError: a file that cannot be read.
    """
    cached = load_or_build(
        section.selection(),
        dim_per_token=section.dim_per_token,
        granularity=section.granularity,
        normalisation=section.normalisation,
        fill_value=section.fill_value,
    )
    names = cached.manifest.names
    group_K, groups = group_checkpoints(names, section.groups)
    tokens = cached.store
    if tokens is None:
        tokens = TokenStore(np.zeros((0, cached.codec.num_tokens, cached.codec.dim), dtype=np.float32))
    return GeneratorData(
        codec=cached.codec,
        tokens=tokens,
        group_K=group_K,
        groups=groups,
        condition_KC=build_conditions(names, section.condition, section.conditions_file),
        names=names,
        manifest=cached.manifest,
        section=section,
        adapter_config=cached.manifest.adapter_config,
    )


# ---------------------------------------------------------------- what file names say


def named_number(name: str, kind: str) -> int | None:
    """The number in a field ``class0793`` or ``seed0003`` of a file's name, between underscores; None without one."""
    stem = re.sub(r"\.(pth|pt|bin|ckpt|safetensors)$", "", name.rsplit("/", 1)[-1])
    found = re.search(rf"(?:^|_){kind}(\d+)(?=_|$)", stem)
    return int(found[1]) if found else None


def _numbers(names: Sequence[str], kind: str, option: str) -> list[int]:
    numbers = [named_number(name, kind) for name in names]
    for name, number in zip(names, numbers):
        if number is None:
            raise DataError(
                f"{option}={kind} needs a field {kind}NNNN in every file name, which {name} has not; rename it, for "
                f"example to 0001_acc0.9000_{kind}0003_tag.pth, or choose another {option}."
            )
    return [number for number in numbers if number is not None]


def _folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def group_checkpoints(names: Sequence[str], groups: str) -> tuple[Tensor, tuple[str, ...]]:
    """The permutation group of each checkpoint: (index into the groups' names, names).

    Networks of one training share their order of neurons, those of independent trainings do not; a group is what the
    generator gets a permutation state for.

    Raises: DataError if a name lacks the field that ``groups`` asks for.
    """
    require_choice("data.groups", groups, GROUPS)
    label: Callable[[str], str]
    if groups == "auto":
        if names and all(named_number(name, "seed") is not None for name in names):
            groups = "seed"
        else:
            groups = "folder" if len({_folder_of(name) for name in names}) > 1 else "none"
    if groups in ("seed", "class"):
        numbers = dict(zip(names, _numbers(names, groups, "data.groups")))
        order = sorted(set(numbers.values()))
        index_K = torch.tensor([order.index(numbers[name]) for name in names], dtype=torch.int64)
        return index_K, tuple(f"{groups}{number:04d}" for number in order)
    if groups == "none":
        return torch.zeros(len(names), dtype=torch.int64), (ONE_GROUP,)
    label = _folder_of if groups == "folder" else str
    labels = [label(name) or "." for name in names]
    places = {text: index for index, text in enumerate(sorted(set(labels)))}
    return torch.tensor([places[text] for text in labels], dtype=torch.int64), tuple(places)


def build_conditions(names: Sequence[str], condition: str, conditions_file: str | None = None) -> Tensor | None:
    """The condition of each checkpoint, float32 (K, C); None for ``condition=none``.

    Raises: DataError if a name lacks the field, or the file lacks a name or has vectors of different lengths.
    """
    require_choice("data.condition", condition, CONDITIONS)
    if condition == "none":
        return None
    if condition == "seed":
        return torch.tensor(_numbers(names, "seed", "data.condition"), dtype=torch.float32).reshape(-1, 1)
    if condition == "class":
        try:
            return class_vectors(_numbers(names, "class", "data.condition"))
        except ConfigError as error:
            raise DataError(f"data.condition=class: a file name says {error}") from None
    return _conditions_of_file(names, Path(conditions_file).expanduser())


def _conditions_of_file(names: Sequence[str], path: Path) -> Tensor:
    try:
        loaded = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"data.conditions_file={path} cannot be read ({error}); it must be JSON.") from None
    if not isinstance(loaded, Mapping):
        raise DataError(f"data.conditions_file={path} must map file names to lists of numbers.")
    rows = []
    for name in names:
        vector = loaded.get(name, loaded.get(name.rsplit("/", 1)[-1]))
        if vector is None:
            raise DataError(f"data.conditions_file={path} has no entry for {name}; every checkpoint needs one.")
        row = np.asarray(vector, dtype=object).reshape(-1)
        if not row.size or not all(isinstance(value, int | float) and np.isfinite(value) for value in row):
            raise DataError(f"data.conditions_file={path}: the entry of {name} must be a list of finite numbers.")
        if rows and len(row) != len(rows[0]):
            raise DataError(
                f"data.conditions_file={path}: {name} has {len(row)} numbers, {names[0]} has {len(rows[0])}; all need "
                "the same count."
            )
        rows.append([float(value) for value in row])
    return torch.tensor(rows, dtype=torch.float32)
