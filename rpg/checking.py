"""What a folder of checkpoints holds, and whether a generator can be trained on it; every problem, not only the first.

Nothing is written: files are read twice, one at a time.

Dimensions: K checkpoints, V compared values.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import QuintetError
from common.report.tables import Table
from rpg.adapters import is_adapter_folder
from rpg.checkpoint_files import names_of, read_checkpoint
from rpg.codec import TokenCodec
from rpg.data import DataSection, build_conditions, group_checkpoints
from rpg.model import Generator
from rpg.model_config import GeneratorConfig
from rpg.similarity import ValueSample, pairwise_distances
from rpg.structure import (
    Structure,
    StructureAccumulator,
    TensorEntry,
    count_not_finite,
    dtype_name,
    require_same_layout,
    require_tensors,
)
from rpg.token_cache import shared_adapter_config

COMPARED_BYTES = 256 << 20  # for the sampled values of all checkpoints
WIDEST_ONE_WIDTH, NARROW_WIDTH = 8192, 12288  # larger tokens get the two-width stack
FEW_CHECKPOINTS = 10
UNRELATED = 0.5  # distance between checkpoints, over that of networks with nothing in common, that means several basins
STILL = 1e-4  # spread between checkpoints, over the tensors' deviation, below which there is nothing to learn
SHOWN_TENSORS = 12

Layout = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True)
class FolderReport:
    """The findings: ``problems`` keep a folder from being used, ``notes`` are worth a look."""

    tables: tuple[Table, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """Everything, JSON-able."""
        tables = {
            table.name: [dict(zip(table.columns, row, strict=True)) for row in table.rows] for table in self.tables
        }
        return {"problems": list(self.problems), "notes": list(self.notes), **tables}


def check_folder(section: DataSection) -> FolderReport:
    """Everything about the checkpoints that ``section`` names.

    Raises: DataError or CheckpointError if there is not one to look at.
    """
    selection = section.selection()
    paths = selection.paths()
    if not paths:
        return FolderReport((), (f"data.checkpoints={selection.folder} holds no checkpoint.",), ())
    names = names_of(paths, selection.folder)
    problems: list[str] = []
    notes: list[str] = []
    usable = _of_one_layout(paths, names, problems)
    tables = [_files_table(paths, selection.folder)]
    try:
        shared_adapter_config(paths)
    except QuintetError as error:
        problems.append(str(error))
    structure, values_KV, kept = _statistics(usable, problems) if usable else (None, None, [])
    if structure is None:
        return FolderReport(tuple(tables), tuple(problems), tuple(notes))
    spread = _spread_between(values_KV, structure)
    tables.append(_network_table(structure))
    if structure.num_values:
        tables.append(_sizes_table(structure, section, len(paths), notes))
        tables.append(_tensors_table(structure))
    groups = _grouping(names, section, problems, tables)
    if values_KV is not None and len(kept) > 1 and structure.num_values:
        tables.append(_similarity_table(values_KV, kept, names, groups, spread, notes))
        _look_for_copies(values_KV, kept, notes)
    _look_at_statistics(structure, notes)
    if len(paths) < FEW_CHECKPOINTS:
        notes.append(
            f"few checkpoints ({len(paths)}): the published generators saw 50, and with few a generator repeats them."
        )
    return FolderReport(tuple(tables), tuple(problems), tuple(notes))


def suggested_dim(num_values: int) -> int:
    """Values per token that fit a network's size: a power of two near ``2.5 sqrt(values)``, at most 16384.

    Agrees with the sizes of the published generators, from 2,864 values (256 there, 128 here) to 198 million.
    """
    power = round(math.log2(2.5 * math.sqrt(max(num_values, 1))))
    return 2 ** min(max(power, 4), 14)


def plan_generator(codec: TokenCodec) -> GeneratorConfig:
    """The published proportions for these tokens: as wide as a token, above 8192 with two widths."""
    wide = codec.dim > WIDEST_ONE_WIDTH
    # the inner width must be a multiple of the heads' 64
    width = max(32, -(-codec.dim // 32) * 32)
    return GeneratorConfig(
        num_tokens=codec.num_tokens,
        dim_per_token=codec.dim,
        d_model=NARROW_WIDTH if wide else width,
        post_d_model=width if wide else None,
        channels=(1, 64, 96, 64, 1) if wide else (1, 32, 64, 128, 64, 32, 1),
    )


def count_parameters(codec: TokenCodec) -> int:
    """Parameters of the generator of ``plan_generator``."""
    with torch.device("meta"):
        config = plan_generator(codec)
        model = Generator(config, torch.empty(config.num_tokens, config.d_model))
    return sum(parameter.numel() for parameter in model.parameters())


# ---------------------------------------------------------------- reading


def _layout(state: Mapping[str, Tensor]) -> Layout:
    facts = ((name, tuple(tensor.shape), tensor.dtype) for name, tensor in state.items())
    return tuple(sorted(facts, key=lambda fact: fact[0]))


def _of_one_layout(paths: Sequence[Path], names: Sequence[str], problems: list[str]) -> list[tuple[Path, str]]:
    """The checkpoints of the most frequent layout; the others become problems."""
    layouts: dict[str, Layout] = {}
    samples: dict[Layout, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
    found: list[tuple[Path, str]] = []
    for path, name in zip(paths, names):
        try:
            state = read_checkpoint(path)
            require_tensors(state, name)
        except QuintetError as error:
            problems.append(str(error))
            continue
        layouts[name] = layout = _layout(state)
        samples.setdefault(layout, {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in state.items()})
        found.append((path, name))
    if not found:
        return []
    usual, _ = Counter(layouts.values()).most_common(1)[0]
    first = next(name for _, name in found if layouts[name] == usual)
    usable = []
    for path, name in found:
        if layouts[name] == usual:
            usable.append((path, name))
            continue
        try:
            meta = {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape, dtype in layouts[name]}
            require_same_layout(samples[usual], meta, name, first)
        except QuintetError as error:
            problems.append(str(error))
    return usable


def _statistics(
    usable: Sequence[tuple[Path, str]], problems: list[str]
) -> tuple[Structure | None, Tensor | None, list[str]]:
    """Structure, sampled values and names of the checkpoints without NaN or infinite values."""
    accumulator = StructureAccumulator()
    sample: ValueSample | None = None
    rows, kept = [], []
    for path, name in usable:
        state = read_checkpoint(path)
        counts = {key: count_not_finite(tensor) for key, tensor in state.items() if tensor.is_floating_point()}
        broken = [key for key, count in counts.items() if count]
        if broken:
            count = sum(counts.values())
            more = f" and {len(broken) - 1} other keys" if len(broken) > 1 else ""
            problems.append(f"{name}: key {broken[0]!r}{more} hold{'s' if not more else ''} {count} NaN or infinite "
                            "values; move this file away.")  # fmt: skip
            continue
        accumulator.add(state, name)
        if sample is None and any(is_float(tensor) for tensor in state.values()):
            sample = ValueSample(state, len(usable), memory_bytes=COMPARED_BYTES)
        if sample is not None:
            rows.append(sample.values(state, name))
        kept.append(name)
    if not kept:
        return None, None, []
    return accumulator.finish(), torch.stack(rows) if rows else None, kept


def is_float(tensor: Tensor) -> bool:
    """Whether a tensor can vary, whatever its name."""
    return tensor.is_floating_point() and tensor.numel() > 1


# ---------------------------------------------------------------- tables


def _files_table(paths: Sequence[Path], folder: Path) -> Table:
    kinds = Counter("adapter" if is_adapter_folder(path) else path.suffix for path in paths)
    sizes = [
        sum(file.stat().st_size for file in path.iterdir() if file.is_file()) if path.is_dir() else path.stat().st_size
        for path in paths
    ]
    rows = [[kind, count] for kind, count in sorted(kinds.items())]
    rows.append(["megabytes together", sum(sizes) / 1e6])
    return Table(name="files", columns=["files", "count"], rows=rows, caption=f"{len(paths)} checkpoints in {folder}")


def _network_table(structure: Structure) -> Table:
    kinds = Counter(entry.kind for entry in structure.entries)
    dtypes = Counter(dtype_name(entry.dtype) for entry in structure.varying)
    rows: list[list] = [
        ["values to generate", structure.num_values],
        ["tensors that vary", kinds["varying"]],
        ["tensors carried over", kinds["constant"]],
        ["tensors tied to others", kinds["alias"]],
        ["types", ", ".join(f"{name} ({count})" for name, count in dtypes.most_common())],
    ]
    return Table(name="network", columns=["network", "count"], rows=rows)


def _sizes_table(structure: Structure, section: DataSection, num_checkpoints: int, notes: list[str]) -> Table:
    best = suggested_dim(structure.num_values)
    dims = sorted({dim for dim in (best // 4, best // 2, best, best * 2, section.dim_per_token) if 8 <= dim <= 65536})
    rows = []
    for dim in dims:
        codec = TokenCodec(structure, dim, section.granularity)
        mark = " ".join(
            word for word, holds in (("suggested", dim == best), ("chosen", dim == section.dim_per_token)) if holds
        )
        megabytes = num_checkpoints * codec.num_tokens * dim * 4 / 1e6
        rows.append([dim, codec.num_tokens, codec.fill, megabytes, count_parameters(codec) / 1e6, mark])
        if dim == section.dim_per_token and codec.fill < 0.5:
            notes.append(
                f"data.dim_per_token={dim} leaves {1 - codec.fill:.0%} of the tokens empty; data.dim_per_token={best} "
                "fits these networks."
            )
    return Table(
        name="tokens",
        columns=["dim_per_token", "tokens", "filled", "token file MB", "generator M parameters", ""],
        rows=rows,
        caption=f"Tokens at granularity {section.granularity}; generator of the published proportions",
    )


def _tensors_table(structure: Structure) -> Table:
    largest = sorted(structure.varying, key=lambda entry: -entry.num_values)[:SHOWN_TENSORS]
    rows = [
        [
            entry.name,
            " x ".join(map(str, entry.shape)),
            dtype_name(entry.dtype),
            entry.num_values,
            entry.mean,
            entry.std,
        ]
        for entry in largest
    ]
    left = len(structure.varying) - len(largest)
    caption = "Largest tensors that vary" + (f"; {left} more" if left else "")
    return Table(
        name="tensors", columns=["tensor", "shape", "type", "values", "mean", "std"], rows=rows, caption=caption
    )


def _grouping(names: Sequence[str], section: DataSection, problems: list[str], tables: list[Table]) -> list[str]:
    """The group's name of each checkpoint; adds the tables of groups and conditions."""
    of_each = ["all"] * len(names)
    try:
        group_K, groups = group_checkpoints(names, section.groups)
        of_each = [groups[index] for index in group_K.tolist()]
        counts = Counter(of_each)
        rows = [[name, counts[name]] for name in groups[:SHOWN_TENSORS]]
        caption = f"Permutation groups (data.groups={section.groups}): {len(groups)}"
        tables.append(Table(name="groups", columns=["group", "checkpoints"], rows=rows, caption=caption))
    except QuintetError as error:
        problems.append(str(error))
    try:
        condition_KC = build_conditions(names, section.condition, section.conditions_file)
        if condition_KC is not None:
            distinct = len(condition_KC.unique(dim=0))
            rows = [["numbers", condition_KC.shape[1]], ["different ones", distinct]]
            caption = f"Conditions (data.condition={section.condition})"
            tables.append(Table(name="conditions", columns=["condition", "count"], rows=rows, caption=caption))
    except QuintetError as error:
        problems.append(str(error))
    return of_each


def _spread_between(values_KV: Tensor | None, structure: Structure) -> float:
    """Deviation of values between checkpoints, over their deviation within tensors (root mean squares)."""
    if values_KV is None or len(values_KV) < 2:
        return math.nan
    between = values_KV.double().var(0).sum().item()
    within = sum(entry.num_values * _raw_std(entry) ** 2 for entry in structure.varying)
    return math.sqrt(between / within) if within > 0 else math.nan


def _raw_std(entry: TensorEntry) -> float:
    """A tensor's deviation in its own units; of running variances, whose logarithm is kept, roughly."""
    return entry.std if entry.scale is None else entry.std * entry.scale


def _similarity_table(
    values_KV: Tensor, kept: Sequence[str], names: Sequence[str], groups: Sequence[str], spread: float, notes: list[str]
) -> Table:
    distance_KK = pairwise_distances(values_KV, values_KV)
    distance_KK.fill_diagonal_(0)
    size = torch.linalg.vector_norm(values_KV.double(), dim=1).mean().item()
    group_of = dict(zip(names, groups))
    labels = [group_of[name] for name in kept]
    same_KK = torch.tensor([[one == two for two in labels] for one in labels])
    off_KK = ~torch.eye(len(kept), dtype=torch.bool)
    following = [distance_KK[index, index + 1].item() for index in range(len(kept) - 1)]
    others_KK = distance_KK + torch.diag(torch.full((len(kept),), math.inf, dtype=torch.float64))
    rows: list[list] = [
        ["length of a network", size, 1.0],
        ["next file in order", sum(following) / len(following), sum(following) / len(following) / size],
        ["nearest other file", others_KK.min(1).values.median().item(), others_KK.min(1).values.median().item() / size],
    ]
    for label, chosen_KK in (("pairs of one group", same_KK & off_KK), ("pairs of two groups", ~same_KK)):
        if chosen_KK.any():
            mean = distance_KK[chosen_KK].mean().item()
            rows.append([label, mean, mean / size])
    rows.append(["spread between files / deviation within tensors", None, spread])
    # independent networks of equal length lie sqrt(2) lengths apart
    pair = distance_KK[same_KK & off_KK]
    if len(pair) and pair.mean().item() > UNRELATED * math.sqrt(2) * size:
        notes.append(
            "Checkpoints of one group are nearly as far apart as unrelated networks: if they come from several "
            "trainings, name them ..._seedNNNN_..., or use data.groups=folder or data.groups=file."
        )
    if spread < STILL:
        notes.append(
            f"The checkpoints differ by {spread:.1e} of their tensors' deviation only; data.normalisation=residual "
            "makes the generator learn that difference."
        )
    return Table(
        name="similarity",
        columns=["Euclidean distance", "mean", "share of length"],
        rows=rows,
        caption="How far checkpoints lie apart",
    )


def _look_for_copies(values_KV: Tensor, kept: Sequence[str], notes: list[str]) -> None:
    """Files may differ in bytes and still hold the same network, so values are compared."""
    by_digest: dict[bytes, list[str]] = {}
    for name, values_V in zip(kept, values_KV):
        by_digest.setdefault(hashlib.sha256(values_V.numpy().tobytes()).digest(), []).append(name)
    copies = [group for group in by_digest.values() if len(group) > 1]
    if copies:
        notes.append(
            f"{', '.join(copies[0][:3])} hold the same values ({len(copies)} such groups); one of each is enough."
        )


def _look_at_statistics(structure: Structure, notes: list[str]) -> None:
    still = [entry.name for entry in structure.varying if entry.std == 0]
    if still:
        notes.append(f"{len(still)} tensors have one value everywhere, for example {still[0]}; they come back exactly.")
    plain = [entry.name for entry in structure.varying if "running_var" in entry.name and entry.scale is None]
    if plain:
        notes.append(
            f"{len(plain)} running variances are zero or negative, for example {plain[0]}; they are normalised without "
            "logarithm."
        )
