"""What networks answer on the test samples, remembered by content: a network is tested once, wherever its file lies.

A remembered answer belongs to the network's values (a hash of all its tensors), the tester's options, the source file
of its class, and size and time of the files and folders that the options name. What else a tester reads is not seen;
``cache=false`` tests everything anew.

Dimensions: N test samples, C classes.
"""

import hashlib
import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rpg.testing import Tester, TesterSection

logger = logging.getLogger(__name__)
VERSION = 1


@dataclass(frozen=True)
class Prediction:
    """The classes that a network answers, and the right ones; int64."""

    predicted_N: Tensor
    target_N: Tensor

    @property
    def wrong_N(self) -> Tensor:
        return self.predicted_N != self.target_N

    @property
    def accuracy(self) -> float:
        return float((self.predicted_N == self.target_N).double().mean())


def state_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def hash_tester(section: TesterSection) -> str:
    """SHA-256 of what decides a tester's answers, as far as it can be seen from outside."""
    options = asdict(section)
    del options["timeout_seconds"]
    facts: list[object] = [VERSION, options]
    if section.kind == "python":
        spec = importlib.util.find_spec(section.target.partition(":")[0])
        if spec is not None and spec.origin and Path(spec.origin).is_file():
            facts.append(hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest())
    for value in [*section.options.values(), *section.command]:
        path = Path(value) if isinstance(value, str) and value and len(value) < 4096 else None
        if path is not None and path.exists():
            status = path.stat()
            facts.append([status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class PredictionCache:
    """Predictions in small files of a folder; None as folder: nothing is remembered.

    Attributes:
        hits, misses: how often ``find`` knew the answer.
    """

    def __init__(self, folder: Path | None, tester_key: str) -> None:
        self._folder, self._tester_key = folder, tester_key
        self.hits = self.misses = 0

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(f'{self._tester_key} {key}'.encode()).hexdigest()[:32]}.safetensors"

    def find(self, key: str) -> Prediction | None:
        """The remembered prediction; a damaged file counts as none."""
        found = None
        if self._folder is not None and self._path(key).is_file():
            try:
                arrays = load_file(self._path(key))
                found = Prediction(arrays["predicted"].long(), arrays["target"].long())
            except (SafetensorError, KeyError, OSError) as error:
                logger.warning("%s is damaged (%s); the network is tested again.", self._path(key), error)
        self.hits += found is not None
        self.misses += found is None
        return found

    def store(self, key: str, prediction: Prediction) -> None:
        """Writes atomically, so that several evaluations can share a folder."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".prediction-", dir=self._folder)
        os.close(handle)
        try:
            arrays = {"predicted": prediction.predicted_N, "target": prediction.target_N}
            save_file({name: value.to(torch.int32).contiguous() for name, value in arrays.items()}, temporary)
            os.replace(temporary, self._path(key))
        finally:
            Path(temporary).unlink(missing_ok=True)


def predict(tester: Tester, cache: PredictionCache, state: Mapping[str, Tensor], *, task: int | None) -> Prediction:
    """The network's answers, remembered or new."""
    key = f"{state_hash(state)} task={task}"
    found = cache.find(key)
    if found is None:
        with torch.no_grad():
            found = Prediction(*tester.predict(state, task=task))
        cache.store(key, found)
    return found
