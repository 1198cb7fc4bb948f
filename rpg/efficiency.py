"""Peak memory of a piece of work: of the GPU as PyTorch counts it, on the CPU what the process has resident."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
PERIOD_SECONDS = 0.005


@dataclass
class Peak:
    """Bytes; complete once the block has ended.

    Attributes:
        start: in use when the block began.
        bytes: the most that was in use.
    """

    start: int = 0
    bytes: int = 0

    @property
    def gigabytes(self) -> float:
        return self.bytes / 2**30

    @property
    def added_gigabytes(self) -> float:
        return (self.bytes - self.start) / 2**30


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the operating system does not tell."""
    try:
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0


@contextlib.contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[Peak]:
    """Measures the block. On the CPU a thread looks every few milliseconds, because the operating system's own maximum
    cannot be set back and would count what came before."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        peak = Peak(torch.cuda.memory_allocated(device))
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    peak = Peak(resident_bytes())
    peak.bytes = peak.start
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(PERIOD_SECONDS):
            peak.bytes = max(peak.bytes, resident_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()
        peak.bytes = max(peak.bytes, resident_bytes())
