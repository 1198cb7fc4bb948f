"""Numbers for the log: weighted means over steps and ranks, throughput, model-FLOPs utilisation, peak memory."""

import functools
import resource
import sys
import time
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from common.parallel import Parallel

# dense matrix peaks in FLOP/s from the vendors' data sheets, (bf16 or fp16, fp32 as torch runs it by default)
_GPU_PEAKS = {
    "H200": (989e12, 67e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "A6000": (155e12, 38.7e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
    "V100": (125e12, 15.7e12),
}


class WeightedMeans:
    """Weighted means of named scalars, accumulated in float64 without waiting for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, total: Tensor | float, weight: float) -> None:
        """Adds a sum over ``weight`` units."""
        total = total.detach().double() if isinstance(total, Tensor) else float(total)
        self._sums[name] = self._sums.get(name, 0.0) + total
        self._weights[name] = self._weights.get(name, 0.0) + float(weight)

    def state_dict(self) -> dict[str, tuple[float, float]]:
        """name -> (sum, weight) of this rank."""
        return {name: (float(total), self._weights[name]) for name, total in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, tuple[float, float]]) -> None:
        self._sums = {name: total for name, (total, _) in state.items()}
        self._weights = {name: weight for name, (_, weight) in state.items()}

    def means(self, parallel: Parallel) -> dict[str, float]:
        """Means over everything added on any rank since the last call. Collective."""
        merged = merge(parallel.gather(self.state_dict()))
        self.load_state_dict({})
        return {name: total / weight for name, (total, weight) in merged.items() if weight}


def merge(states: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """Sums the (sum, weight) pairs of several ranks."""
    merged: dict[str, tuple[float, float]] = {}
    for state in states:
        for name, (total, weight) in state.items():
            before = merged.get(name, (0.0, 0.0))
            merged[name] = (before[0] + total, before[1] + weight)
    return merged


class Throughput:
    """Samples, tokens and FLOPs per second of training alone: validation, hooks and saving are not counted."""

    def __init__(
        self, parallel: Parallel, precision: str, tokens_per_sample: int | None, flops_per_sample: float | None
    ) -> None:
        self._parallel, self._precision = parallel, precision
        self._tokens, self._flops = tokens_per_sample, flops_per_sample
        self._samples, self._seconds, self._started = 0, 0.0, 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self, samples: int) -> None:
        self._seconds += time.perf_counter() - self._started
        self._samples += samples

    def rates(self) -> dict[str, float]:
        """``throughput/*`` since the last call (over all ranks)."""
        rate = self._samples / max(self._seconds, 1e-9)
        self._samples, self._seconds = 0, 0.0
        rates = {"throughput/samples_per_second": rate}
        if self._tokens:
            rates["throughput/tokens_per_second"] = rate * self._tokens
        if self._flops:
            peak = peak_flops(self._parallel.device, self._precision) * self._parallel.world_size
            rates["throughput/mfu"] = rate * self._flops / peak
        return rates


@functools.cache
def peak_flops(device: torch.device, precision: str) -> float:
    """Matrix FLOP/s that one process can reach: the data sheet's for known GPUs, else measured with 512 x 512."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, (low, full) in _GPU_PEAKS.items():
            if known in name:
                return full if precision == "fp32" else low
    size = 512 if device.type == "cpu" else 8192
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    left = torch.zeros(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def peak_memory_gb(device: torch.device) -> float:
    """Most memory used so far in 1e9 bytes: allocated on the GPU, or resident of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
