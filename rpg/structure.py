"""What all checkpoints of a folder have in common: which tensors there are, and the statistics that normalise them.

A tensor VARIES (and is generated) if it is floating point, has at least two elements and does not count batches. All
others are CONSTANT: the first checkpoint's value is carried over bit by bit. A key whose tensor shares its memory with
an earlier key's is an ALIAS, so that tied weights stay tied.

Dimensions: K checkpoints, V values of one tensor.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.config import require_choice
from common.errors import DataError

NORMALISATIONS = ("layer", "residual")
FORMAT = 1
STRUCTURE_FILE, VALUES_FILE = "structure.json", "structure.safetensors"
VARIANCE_SHARE, VARIANCE_OFFSET = 0.95, 0.05  # running variances: ln(w / (0.95 mean) + 0.05)
CHUNK_VALUES = 1 << 16  # at once in float64: stays in a core's cache

Kind = Literal["varying", "constant", "alias"]


@dataclass(frozen=True)
class TensorEntry:
    """One key of the state dict.

    Attributes:
        mean, std: of a varying tensor's values, averaged over checkpoints; for running variances, of their logarithm.
        scale: 0.95 of a running variance's mean; None for other tensors.
        value: a constant's value.
        alias_of: the earlier key whose tensor this one is.
        mean_V, variance_V: residual normalisation only: moments of each value over the checkpoints, float32.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind = "varying"
    mean: float = 0.0
    std: float = 1.0
    scale: float | None = None
    value: Tensor | None = field(default=None, repr=False)
    alias_of: str | None = None
    mean_V: Tensor | None = field(default=None, repr=False)
    variance_V: Tensor | None = field(default=None, repr=False)

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Structure:
    """All keys of the state dict in order; see the module's text."""

    entries: tuple[TensorEntry, ...]
    normalisation: Literal["layer", "residual"] = "layer"
    num_checkpoints: int = 0

    @property
    def varying(self) -> tuple[TensorEntry, ...]:
        return tuple(entry for entry in self.entries if entry.kind == "varying")

    @property
    def num_values(self) -> int:
        """Generated values of one network."""
        return sum(entry.num_values for entry in self.varying)

    def require_same_layout(self, state: Mapping[str, Tensor], source: str = "the state dict") -> None:
        """Raises DataError unless ``state`` has these keys with these shapes and dtypes."""
        layout = {entry.name: (entry.shape, entry.dtype) for entry in self.entries}
        require_same_layout(layout, state, source, "the structure")

    def to_folder(self, folder: str | Path) -> None:
        """Writes ``structure.json`` and ``structure.safetensors`` into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        listed = []
        for entry in self.entries:
            item: dict[str, object] = {"name": entry.name, "shape": list(entry.shape), "dtype": dtype_name(entry.dtype)}
            item["kind"] = entry.kind
            if entry.kind == "varying":
                item |= {"mean": entry.mean, "std": entry.std}
                if entry.scale is not None:
                    item["scale"] = entry.scale
            elif entry.kind == "alias":
                item["alias_of"] = entry.alias_of
            for name in ("value", "mean_V", "variance_V"):
                if (tensor := getattr(entry, name)) is not None:
                    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor  # not every file knows them
                    tensors[f"{name}/{entry.name}"] = tensor.detach().cpu().clone().contiguous()
            listed.append(item)
        facts = {
            "format": FORMAT,
            "normalisation": self.normalisation,
            "num_checkpoints": self.num_checkpoints,
            "tensors": listed,
        }
        save_file(tensors, folder / VALUES_FILE)
        (folder / STRUCTURE_FILE).write_text(json.dumps(facts, indent=1))

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Structure":
        """Reads what ``to_folder`` wrote.

        Raises: DataError if a file is missing, damaged or of another version.
        """
        folder = Path(folder)
        try:
            facts = json.loads((folder / STRUCTURE_FILE).read_text())
            if facts["format"] != FORMAT:
                raise DataError(
                    f"{folder / STRUCTURE_FILE} has format {facts['format']}, this version reads {FORMAT}; delete the "
                    "folder, it is made again from the checkpoints."
                )
            tensors = load_file(folder / VALUES_FILE)
            entries = []
            for item in facts["tensors"]:
                name = item["name"]
                held = {kind: tensors.get(f"{kind}/{name}") for kind in ("value", "mean_V", "variance_V")}
                options = {key: item[key] for key in ("kind", "mean", "std", "scale", "alias_of") if key in item}
                dtype = getattr(torch, item["dtype"])
                if dtype.is_complex:
                    held["value"] = torch.view_as_complex(held["value"])
                entries.append(TensorEntry(name, tuple(item["shape"]), dtype, **options, **held))
        except DataError:
            raise
        except Exception as error:  # json, safetensors and the file system each have their own
            raise DataError(
                f"{folder} does not hold a readable structure ({type(error).__name__}: {error}); delete it, it is made "
                "again from the checkpoints."
            ) from None
        return cls(tuple(entries), facts["normalisation"], facts["num_checkpoints"])


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_constant(name: str, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether a tensor is carried over instead of generated; tensors without elements are, too."""
    return "num_batches_tracked" in name or math.prod(shape) <= 1 or not dtype.is_floating_point


def structure_of_shapes(state: Mapping[str, Tensor]) -> Structure:
    """The structure of a network without its values (``meta`` tensors do): mean 0 and deviation 1 everywhere.

    Enough for counting tokens and planning memory.
    """
    require_tensors(state, "the state dict")
    ties = find_ties(state)
    entries = []
    for name, tensor in state.items():
        shape, dtype = tuple(tensor.shape), tensor.dtype
        if name in ties:
            entries.append(TensorEntry(name, shape, dtype, "alias", alias_of=ties[name]))
        elif is_constant(name, shape, dtype):
            value = torch.zeros(shape, dtype=dtype) if tensor.is_meta else tensor.detach().cpu().clone()
            entries.append(TensorEntry(name, shape, dtype, "constant", value=value))
        else:
            entries.append(TensorEntry(name, shape, dtype, scale=1.0 if "running_var" in name else None))
    return Structure(tuple(entries))


def compute_structure(
    checkpoints: Iterable[Mapping[str, Tensor]], normalisation: str = "layer", *, names: Iterable[str] | None = None
) -> Structure:
    """Statistics over checkpoints, which are read once, one at a time.

    Per tensor and checkpoint the mean and the unbiased standard deviation are taken (of ``ln(w / q + 0.05)`` for
    running variances, where q is 0.95 of their mean), then averaged over the checkpoints; the spread between
    checkpoints does not enter. ``residual`` also keeps each value's mean and variance over the checkpoints.

    Args:
        normalisation: ``layer`` or ``residual``.
        names: what to call the checkpoints in messages.

    Raises: DataError if there is no checkpoint, or one differs from the first in keys, shapes or dtypes, or holds a
        value that is not finite.
    """
    accumulator = StructureAccumulator(normalisation)
    labels = iter(names) if names is not None else None
    for index, state in enumerate(checkpoints):
        accumulator.add(state, next(labels) if labels is not None else f"checkpoint {index}")
    return accumulator.finish()


def require_tensors(state: Mapping[str, object], source: str) -> None:
    """Raises DataError unless every value is a dense tensor."""
    if not state:
        raise DataError(f"{source} holds no tensor; a checkpoint is a state dict with at least one.")
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
            kind = f"a {value.layout} tensor" if isinstance(value, Tensor) else f"of type {type(value).__name__}"
            raise DataError(
                f"{source}: key {name!r} is {kind}; a state dict may hold dense tensors only. Save it without this key."
            )


def require_same_layout(
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]], state: Mapping[str, Tensor], source: str, first: str
) -> None:
    """Raises DataError unless ``state`` has the keys, shapes and dtypes of ``layout``, naming file, key and both."""
    remedy = "All checkpoints must be of one architecture; move this file away or choose files with data.pattern."
    for name, (shape, dtype) in layout.items():
        if name not in state:
            raise DataError(f"{source} has no key {name!r}, which {first} has with shape {shape}. {remedy}")
        found = state[name]
        if tuple(found.shape) != shape:
            raise DataError(f"{source}: key {name!r} has shape {tuple(found.shape)}, but {shape} in {first}. {remedy}")
        if found.dtype != dtype:
            raise DataError(
                f"{source}: key {name!r} has dtype {dtype_name(found.dtype)}, but {dtype_name(dtype)} in {first}. "
                f"{remedy}"
            )
    extra = [name for name in state if name not in layout]
    if extra:
        shape = tuple(state[extra[0]].shape)
        raise DataError(f"{source} has the key {extra[0]!r} with shape {shape}, which {first} has not. {remedy}")


def find_ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Keys whose tensor is another, earlier key's: the same memory, seen with the same shape and strides."""
    owners: dict[tuple, str] = {}
    ties = {}
    for name, tensor in state.items():
        if tensor.numel() == 0:
            continue
        place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if place in owners:
            ties[name] = owners[place]
        else:
            owners[place] = name
    return ties


class StructureAccumulator:
    """Takes in one checkpoint after the other; ``finish`` gives the structure."""

    def __init__(self, normalisation: str = "layer") -> None:
        require_choice("data.normalisation", normalisation, NORMALISATIONS)
        self.normalisation = normalisation
        self.num_checkpoints = 0
        self._layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._first = ""
        self._constants: dict[str, Tensor] = {}
        self._moments: dict[str, _Moments] = {}
        self._ties: dict[str, str] = {}

    def add(self, state: Mapping[str, Tensor], source: str) -> None:
        """Raises: DataError, see ``compute_structure``."""
        require_tensors(state, source)
        if self.num_checkpoints == 0:
            self._layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
            self._first = source
            self._ties = find_ties(state)
            for name, tensor in state.items():
                if is_constant(name, *self._layout[name]):
                    self._constants[name] = tensor.detach().cpu().clone().contiguous()
                else:
                    keep_raw = "running_var" in name and self.normalisation == "residual"
                    self._moments[name] = _Moments("running_var" in name, self.normalisation == "residual", keep_raw)
        else:
            require_same_layout(self._layout, state, source, self._first)
            tied_here = find_ties(state)
            for name, other in list(self._ties.items()):
                # a file format may have stored the tied tensor twice: what counts is that the values agree
                if tied_here.get(name) != other and not torch.equal(state[name], state[other]):
                    del self._ties[name]
        for name, tensor in state.items():
            if name in self._moments:
                self._moments[name].add(tensor.detach().reshape(-1), f"{source}: key {name!r}")
            elif tensor.is_floating_point() and (count := count_not_finite(tensor)):
                raise DataError(_not_finite(f"{source}: key {name!r}", count))
        self.num_checkpoints += 1

    def finish(self) -> Structure:
        """Raises: DataError if no checkpoint was added."""
        if not self.num_checkpoints:
            raise DataError("There is no checkpoint to take statistics of; at least one is needed.")
        entries = []
        for name, (shape, dtype) in self._layout.items():
            if name in self._ties:
                entries.append(TensorEntry(name, shape, dtype, "alias", alias_of=self._ties[name]))
            elif name in self._constants:
                entries.append(TensorEntry(name, shape, dtype, "constant", value=self._constants[name]))
            else:
                entries.append(TensorEntry(name, shape, dtype, **self._moments[name].finish()))
        return Structure(tuple(entries), self.normalisation, self.num_checkpoints)


def count_not_finite(tensor: Tensor) -> int:
    """NaN and infinite values of a floating-point tensor."""
    widened = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # torch knows few operations on 8-bit floats
    return tensor.numel() - int(torch.isfinite(widened).sum())


def _not_finite(where: str, count: int) -> str:
    return (
        f"{where} holds {count} value{'' if count == 1 else 's'} that are NaN or infinite; a diverged checkpoint "
        "cannot be learned from. Move this file away or choose files with data.pattern."
    )


class _Moments:
    """Statistics of one varying tensor."""

    def __init__(self, is_variance: bool, residual: bool, keep_raw: bool) -> None:
        self.means: list[float] = []
        self.stds: list[float] = []
        self.log_means: list[float] = []
        self.log_stds: list[float] = []
        self.scales: list[float] = []
        self.is_variance = is_variance  # until a checkpoint shows values whose logarithm makes no sense
        self.residual, self.keep_raw = residual, keep_raw
        self.raw: list[Tensor] = []
        self.first_V = self.sum_V = self.squares_V = None

    def add(self, values_V: Tensor, where: str) -> None:
        if values_V.dtype.itemsize == 1:  # torch knows few operations on 8-bit floats
            values_V = values_V.float()
        mean, std = mean_and_std(values_V)
        if not math.isfinite(mean + std):
            finite_V = torch.isfinite(values_V)
            if not finite_V.all():
                raise DataError(_not_finite(where, int((~finite_V).sum())))
        self.means.append(mean)
        self.stds.append(std)
        if self.is_variance:
            scale = VARIANCE_SHARE * mean
            self.is_variance = scale > 0 and float(values_V.min()) >= 0
            if self.is_variance:
                log_mean, log_std = mean_and_std(log_variance(values_V.double(), scale))
                self.scales.append(scale)
                self.log_means.append(log_mean)
                self.log_stds.append(log_std)
        if self.keep_raw:
            self.raw.append(values_V.double())
        elif self.residual:
            self._add_residual(values_V.float())

    def _add_residual(self, values_V: Tensor) -> None:
        # relative to the first checkpoint, because neighbouring checkpoints differ by a few percent only
        if self.first_V is None:
            self.first_V, self.sum_V = values_V.clone(), torch.zeros_like(values_V)
            self.squares_V = torch.zeros_like(values_V)
            return
        change_V = values_V - self.first_V
        self.sum_V += change_V
        self.squares_V += change_V.square_()

    def finish(self) -> dict[str, object]:
        count = len(self.means)
        is_log = self.is_variance and bool(self.scales)
        scale = math.fsum(self.scales) / count if is_log else None
        means, stds = (self.log_means, self.log_stds) if is_log else (self.means, self.stds)
        mean, std = math.fsum(means) / count, math.fsum(stds) / count
        if std == 0:
            # every checkpoint has one value everywhere: if it is the same one, the mean alone restores it exactly
            mean = means[0] if len(set(means)) == 1 else mean
            std = math.sqrt(math.fsum((value - mean) ** 2 for value in means) / max(count - 1, 1))
        facts: dict[str, object] = {"mean": mean, "std": std, "scale": scale}
        if self.keep_raw:
            for values_V in self.raw:
                self._add_residual(values_V.float() if scale is None else log_variance(values_V, scale).float())
        if self.residual:
            mean_V = self.first_V + self.sum_V / count
            variance_V = (self.squares_V - self.sum_V.square() / count).clamp_(min=0) / max(count - 1, 1)
            facts |= {"mean_V": mean_V, "variance_V": variance_V}
        return facts


def log_variance(values: Tensor, scale: float) -> Tensor:
    """Running variances as logarithms: ``ln(w / q + 0.05)``, finite at zero."""
    return torch.log(values / scale + VARIANCE_OFFSET)


def mean_and_std(values_V: Tensor) -> tuple[float, float]:
    """Mean and unbiased deviation in float64; a deviation of exactly 0 where all values are equal."""
    low, high = torch.aminmax(values_V)
    if low == high:
        return float(low), 0.0
    count = values_V.numel()
    mean = math.fsum(float(part.double().sum()) for part in values_V.split(CHUNK_VALUES)) / count
    square = math.fsum(float((part.double() - mean).square().sum()) for part in values_V.split(CHUNK_VALUES))
    return mean, math.sqrt(square / (count - 1))
