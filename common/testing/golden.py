"""Golden cases: arrays frozen from the reference implementations, and the deterministic weights they were made with.

``<folder>/cases.json`` describes the cases of one paper; each has at most one ``.npz`` with ``in_*`` arrays (tokens and
every random number that the reference would draw) and ``out_*`` arrays (what it computed).
"""

import json
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

DEFAULT_GOLDEN_DIR = Path(__file__).resolve().parents[2] / "tests" / "golden"


@dataclass(frozen=True)
class Case:
    """One frozen case.

    Attributes:
        name: unique within the paper.
        raw: the whole entry of ``cases.json`` (text cases keep their pairs or documents there).
        config: ``raw["config"]`` or an empty dict.
        arrays: all arrays of the ``.npz``, ``in_*`` and ``out_*``.
    """

    name: str
    raw: Mapping
    config: Mapping
    arrays: Mapping[str, np.ndarray] = field(repr=False)

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        return {name: array for name, array in self.arrays.items() if name.startswith("in_")}

    @property
    def outputs(self) -> dict[str, np.ndarray]:
        return {name: array for name, array in self.arrays.items() if name.startswith("out_")}

    def check(self, name: str, got: object) -> None:
        """Asserts that ``got`` equals the frozen array ``name`` under the case's rule.

        Integer arrays must be equal; floats may differ by ``tolerance``, or by ``tolerance * max(1, max|expected|)``
        where the case says ``relative``.
        """
        expected = self.arrays[name]
        value = got.detach().cpu().numpy() if isinstance(got, torch.Tensor) else np.asarray(got)
        assert value.shape == expected.shape, f"{self.name}.{name}: shape {value.shape}, expected {expected.shape}"
        if not np.issubdtype(expected.dtype, np.floating):
            different = np.flatnonzero(value.reshape(-1) != expected.reshape(-1))
            assert not different.size, f"{self.name}.{name}: {different.size} of {expected.size} integers differ"
            return
        tolerance = self.raw["tolerance"]
        if isinstance(tolerance, Mapping):  # one for each kind of output: the kind that the name holds, else the least
            kinds = [value for kind, value in tolerance.items() if kind in name]
            tolerance = kinds[0] if kinds else min(tolerance.values())
        if self.raw.get("relative"):
            tolerance *= max(1.0, float(np.abs(expected).max(initial=0.0)))
        error = np.abs(value.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0)
        assert error <= tolerance, f"{self.name}.{name}: largest error {error:.3e} exceeds {tolerance:.3e}"


def load_cases(paper: str, folder: str | Path = DEFAULT_GOLDEN_DIR) -> dict[str, Case]:
    """All golden cases of ``paper`` by name; ``folder`` holds one sub-folder per paper (pytest's ``--golden DIR``)."""
    root = Path(folder) / paper
    entries = json.loads((root / "cases.json").read_text())["cases"]
    cases = {}
    for entry in entries:
        arrays: dict[str, np.ndarray] = {}
        if entry.get("file"):
            with np.load(root / entry["file"]) as archive:
                arrays = {name: archive[name] for name in archive.files}
        cases[entry["name"]] = Case(entry["name"], entry, entry.get("config", {}), arrays)
    return cases


def fill_values(key: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Float64 values of one tensor of a golden model: the same for equal (key, shape, seed) on every machine."""
    stream = np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode()))  # legacy MT19937: its stream is frozen
    normal = stream.standard_normal(tuple(shape))
    if key.endswith("running_var"):
        return 1.0 + 0.1 * np.abs(normal)
    if len(shape) <= 1:
        return 0.1 * normal + (1.0 if key.endswith("weight") else 0.0)
    return normal / np.sqrt(int(np.prod(shape[1:])))


@torch.no_grad()
def fill(module: nn.Module, seed: int = 0, skip: Collection[str] = ()) -> nn.Module:
    """Overwrites every floating-point entry of the state dict, except keys in ``skip``, with ``fill_values``."""
    for key, tensor in sorted(module.state_dict().items()):
        if tensor.is_floating_point() and key not in skip:
            tensor.copy_(torch.from_numpy(fill_values(key, tuple(tensor.shape), seed)).to(tensor.dtype))
    return module
