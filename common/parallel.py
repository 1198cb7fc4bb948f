"""Processes and devices: who am I, where do I compute, and sums over ranks that also work with one process."""

import atexit
import contextlib
import datetime
import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from common.errors import ConfigError

TIMEOUT = datetime.timedelta(minutes=30)  # a rank may wait that long while the main process verifies a checkpoint


@dataclass(frozen=True)
class Parallel:
    """This process among the others. ``rank``, ``world_size`` and ``local_rank`` are 0, 1 and 0 without torchrun."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    plan: str = field(default="none")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise float64 sum over ranks; the same on every rank."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """Element-wise largest value over ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Sequence[float], operation: dist.ReduceOp) -> list[float]:
        if self.world_size == 1 or not values:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, operation)
        return total.tolist()

    def gather(self, value: object) -> list:
        """Every rank's picklable ``value``, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: object) -> object:
        """The main process's ``value``, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Returns once every rank has arrived."""
        if self.world_size > 1:
            self.sum([0.0])


_current: Parallel | None = None


@contextlib.contextmanager
def start(plan: str = "none") -> Iterator[Parallel]:
    """Joins the process group that torchrun announces in the environment; the group lasts as long as the process.

    NCCL on GPUs (one per process), gloo on the CPU. Sharded plans get a group of one when started without torchrun.
    Re-entrant: an inner ``start`` returns the outer one's ``Parallel``.

    Raises: ConfigError for several processes without a plan that keeps them together, or fewer GPUs than processes.
    """
    global _current
    if _current is not None:
        if _current.plan != plan:
            raise ConfigError(
                f"parallel.plan={plan}, but this process was started with {_current.plan}; use one of them."
            )
        yield _current
        return
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if plan == "none" and world_size > 1:
        raise ConfigError(
            f"parallel.plan=none does not work with {world_size} processes, each would train its own model; "
            "choose parallel=ddp, fsdp2, zero1, zero2 or zero3, or start one process."
        )
    device = _device(local_rank)
    if (world_size > 1 or plan not in ("none", "ddp")) and not dist.is_initialized():
        _join(world_size, device)
    _current = Parallel(rank, world_size, local_rank, device, plan)
    linear = torch.nn.functional.linear
    try:
        yield _current
    finally:
        torch.nn.functional.linear = linear  # DeepSpeed's ZeRO-3 puts another one in its place, for the whole process
        _current = None


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK={local_rank}, but this machine has {torch.cuda.device_count()} GPUs; "
            "start at most that many processes per node (NPROC)."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _join(world_size: int, device: torch.device) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    if world_size == 1:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT, device_id=device_id)
    else:
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device_id)
    # once per process, not once per ``start``: a second group at torchrun's store would find the addresses of the
    # first, and DeepSpeed remembers the group it saw first
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        # objects that hold work of the group must go while Python still runs: a thread of the group that drops one
        # during the interpreter's end would abort the process, after a run that was fine
        gc.collect()
        dist.destroy_process_group()
