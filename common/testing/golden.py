"""Golden cases: arrays frozen from the reference implementations, and the deterministic weights they were made with.

``<folder>/cases.json`` describes the cases of one paper; each has at most one ``.npz`` with ``in_*`` arrays (tokens and
every random number that the reference would draw) and ``out_*`` arrays (what it computed).
"""

import json
import math
import re
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROUNDING = 2e-5  # share of the largest value, for outputs that a tolerance made for other outputs says nothing of
TINY = 1e-7  # entries that are zero but for rounding agree within it, where a rule for single outputs is relative
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
        return {name: array for name, array in self.arrays.items() if name.startswith("in")}

    @property
    def outputs(self) -> dict[str, np.ndarray]:
        return {name: array for name, array in self.arrays.items() if name.startswith("out")}

    def check(self, name: str, got: object) -> None:
        """Asserts that ``got`` equals the frozen array ``name`` under the case's rule.

        Integer arrays must be equal (or differ by at most 1, where the case allows it); floats may differ by
        ``tolerance``, by ``rtol |expected| + atol`` if it holds these, or by ``tolerance * max(1, max|expected|)``
        where the case says ``relative``.
        """
        expected = self.arrays[name]
        value = got.detach().cpu().numpy() if isinstance(got, torch.Tensor) else np.asarray(got)
        assert value.shape == expected.shape, f"{self.name}.{name}: shape {value.shape}, expected {expected.shape}"
        if not np.issubdtype(expected.dtype, np.floating):
            self._check_integers(name, value, expected)
            return
        value, expected = value.astype(np.float64), expected.astype(np.float64)
        rtol, atol = self._tolerances(name, expected)
        absent = np.isnan(expected)  # padding
        assert np.array_equal(np.isnan(value), absent), f"{self.name}.{name}: NaN at other places than expected"
        value, expected = np.where(absent, 0, value), np.where(absent, 0, expected)
        error = np.abs(value - expected)
        excess = (error - rtol * np.abs(expected)).max(initial=0.0)
        assert excess <= atol, (
            f"{self.name}.{name}: largest error {error.max(initial=0.0):.3e} exceeds rtol {rtol:g}, atol {atol:g}"
        )

    def _check_integers(self, name: str, value: np.ndarray, expected: np.ndarray) -> None:
        slack = 1 if "+-1" in str(self.raw.get("tolerance")) else 0
        different = np.flatnonzero(np.abs(value.astype(np.int64) - expected.astype(np.int64)).reshape(-1) > slack)
        assert not different.size, f"{self.name}.{name}: {different.size} of {expected.size} integers differ"

    def _tolerances(self, name: str, expected: np.ndarray) -> tuple[float, float]:
        """(relative, absolute): from a number, ``{"rtol", "atol"}``, a text, or one of these per kind of output."""
        tolerance = self.raw["tolerance"]
        if isinstance(tolerance, Mapping) and not {"rtol", "atol"} & tolerance.keys():
            tolerance = _of_kind(name, tolerance)
        if isinstance(tolerance, Mapping):
            return tolerance.get("rtol", 0.0), tolerance.get("atol", 0.0)
        if isinstance(tolerance, str):
            rtol, atol, is_named = _in_words(name, tolerance)
            return rtol, atol if is_named else ROUNDING * float(np.abs(expected).max(initial=0.0))
        if self.raw.get("relative"):
            tolerance *= max(1.0, float(np.abs(expected).max(initial=0.0)))
        return 0.0, tolerance


def _of_kind(name: str, tolerances: Mapping) -> object:
    """The entry whose key shares most words with the output's name, the earliest ones; the strictest if none does."""
    words = name.split("_")

    def fit(kind: str) -> tuple[int, int, int]:
        shared = [words.index(word) for word in kind.split("_") if word in words]
        return len(shared), -min(shared, default=len(words)), -len(kind.split("_"))

    best = max(tolerances, key=fit)
    if fit(best)[0]:
        return tolerances[best]
    strict = [value for value in tolerances.values() if not isinstance(value, str)]
    return min(strict, key=lambda value: value.get("rtol", 0.0) if isinstance(value, Mapping) else value)


def _in_words(name: str, tolerance: str) -> tuple[float, float, bool]:
    """Of a text: ``exact...``, ``... within 2/80 ...``, ``atol 1e-5, rtol 1e-4``, or ``loss rtol 1e-4, gradient norms
    rtol 2e-3``, where words before a number say which outputs it is for; the last value: whether it is for this one."""
    if share := re.search(r"within (\d+)/(\d+)", tolerance):
        return 0.0, int(share[1]) / int(share[2]), True
    found = re.findall(r"([a-z ]*)\b(rtol|atol) ([0-9.e-]+)", tolerance)
    if found:
        values = {"rtol": 0.0, "atol": 0.0}
        per_output = sum(kind == "rtol" for _, kind, _ in found) > 1
        is_named = not per_output
        for words, kind, value in found:
            mine = [word for word in words.split() if word[:4] in name]
            if not values[kind] or mine:
                values[kind] = float(value)
            is_named = is_named or bool(mine)
        return values["rtol"], TINY if per_output and not values["atol"] else values["atol"], is_named
    assert tolerance.startswith("exact"), f"the tolerance {tolerance!r} is none that is known"
    return 0.0, 1e-12, True


def load_cases(paper: str, folder: str | Path = DEFAULT_GOLDEN_DIR) -> dict[str, Case]:
    """All golden cases of ``paper`` by name; ``folder`` holds one sub-folder per paper (pytest's ``--golden DIR``)."""
    root = Path(folder) / paper
    listed = json.loads((root / "cases.json").read_text())["cases"]
    entries = listed.items() if isinstance(listed, Mapping) else [(entry["name"], entry) for entry in listed]
    cases = {}
    for name, entry in entries:
        arrays: dict[str, np.ndarray] = {}
        file, by_name = entry.get("file") or entry.get("npz"), root / f"{name}.npz"
        if file or by_name.is_file():
            with np.load(root / file if file else by_name) as archive:
                arrays = {key: archive[key] for key in archive.files}
        cases[name] = Case(name, entry, entry.get("config") or {}, arrays)
    return cases


def assert_outputs_agree(case: Case, outputs: Mapping[str, object]) -> None:
    """Every frozen array is computed and agrees, and so does what else was computed and stands in the description."""
    compared = 0
    for name in case.outputs:
        assert name in outputs, f"{case.name}: {name} is not computed"
        case.check(name, outputs[name])
        compared += 1
    for name in outputs.keys() - case.outputs.keys():
        if name in case.raw:
            assert_agrees(outputs[name], case.raw[name], f"{case.name}.{name}")
            compared += 1
    assert compared, f"{case.name}: nothing was compared"


def assert_agrees(found: object, expected: object, where: str) -> None:
    """Equal up to rounding; a mapping may leave out what describes a case rather than results from it."""
    if isinstance(found, dict):
        for key, value in found.items():
            assert key in expected, f"{where}: {key} is no key of the case"
            assert_agrees(value, expected[key], f"{where}.{key}")
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected), f"{where}: {len(found)} entries, expected {len(expected)}"
        for index, (value, wanted) in enumerate(zip(found, expected, strict=True)):
            assert_agrees(value, wanted, f"{where}[{index}]")
    elif isinstance(found, float) and expected is not None:
        assert math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-6), f"{where}: {found}, expected {expected}"
    else:
        assert found == expected, f"{where}: {found!r}, expected {expected!r}"


def fill_values(key: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Float64 values of one tensor of a golden model: the same for equal (key, shape, seed) on every machine."""
    stream = np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode()))  # legacy MT19937: its stream is frozen
    normal = stream.standard_normal(tuple(shape))
    if key.endswith("running_var"):
        return 1.0 + 0.1 * np.abs(normal)
    if len(shape) <= 1:
        return 0.1 * normal + (1.0 if key.endswith("weight") else 0.0)
    return normal / np.sqrt(int(np.prod(shape[1:])))


def fill_listed(module: nn.Module, case: Mapping) -> nn.Module:
    """``fill`` of the keys that the case lists as filled, with its seed; the others keep what they were built with.

    Raises: AssertionError if a listed key is missing or has another shape.
    """
    state, listed = module.state_dict(), {key: tuple(shape) for key, shape in case["filled_keys"]}
    for key, shape in listed.items():
        assert key in state, f"the module has no {key}"
        assert tuple(state[key].shape) == shape, f"{key} has shape {tuple(state[key].shape)}, the case's is {shape}"
    return fill(module, case["weights"]["seed"], skip=state.keys() - listed.keys())


@torch.no_grad()
def fill(module: nn.Module, seed: int = 0, skip: Collection[str] = ()) -> nn.Module:
    """Overwrites every floating-point entry of the state dict, except keys in ``skip``, with ``fill_values``."""
    for key, tensor in sorted(module.state_dict().items()):
        if tensor.is_floating_point() and key not in skip:
            tensor.copy_(torch.from_numpy(fill_values(key, tuple(tensor.shape), seed)).to(tensor.dtype))
    return module
