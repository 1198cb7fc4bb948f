"""How one model is spread over processes: recompute -> compile -> wrap, in that order, behind one small interface.

``Plan`` is what the trainer sees. This module holds torch's plans (none, ddp, fsdp2); ``common/zero.py`` the DeepSpeed
ones, imported only when asked for because importing DeepSpeed takes seconds.
"""

import contextlib
import functools
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from common.config import TrainerConfig
from common.errors import CheckpointError, ConfigError
from common.optim import build_optimizer, empty_optimizer_tensors, optimizer_tensors, set_learning_rate
from common.parallel import Parallel
from common.precision import autocast_forward
from common.task import Task

SHARDED_PARAMETERS = ("fsdp2", "zero3")


class Plan(ABC):
    """A model, its optimizer and the way both are spread over ranks.

    Attributes:
        module: the model itself, with its own parameter names.
        model: what a task calls in training.
        forward_is_collective: whether a forward pass communicates, so that all ranks must run it together.
    """

    module: nn.Module
    model: nn.Module
    forward_is_collective: bool

    @abstractmethod
    def accumulate(self, last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward of one micro-batch; ``last`` for the final one of an optimizer step."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of ``loss``; they are averaged over ranks by the end of the last micro-batch."""

    @abstractmethod
    def step(self, rate: float, gradient_scale: float = 1.0) -> float:
        """Clips and applies one update at learning rate ``rate``, and clears the gradients.

        Args:
            gradient_scale: factor that the gradients carry (float16 loss scaling); divided out first.

        Returns:
            global gradient norm before clipping. If it is not finite nothing was updated.
        """

    @abstractmethod
    def tracked(self) -> dict[str, Tensor]:
        """Trainable parameters by name, as this rank holds them: whole tensors, DTensors or flat shards."""

    @abstractmethod
    def forget_gathered(self) -> None:
        """Frees parameters that a forward pass gathered, so that the next one sees the shards as they are now."""

    @abstractmethod
    def full_state(self, everywhere: bool = False) -> dict[str, Tensor]:
        """The whole state dict on the CPU of the main process (elsewhere empty, unless asked for). Collective.

        On the CPU the tensors may share the model's memory: use them before it changes.
        """

    @abstractmethod
    def save(self, folder: Path, averaged: Mapping[str, Tensor]) -> None:
        """Writes what a resumed run needs (model, optimizer, moving average) into ``folder``. Collective."""

    @abstractmethod
    def load(self, folder: Path, averaged: Mapping[str, Tensor], saved_by: Mapping) -> None:
        """Reads what ``save`` wrote, into the model, the optimizer and the tensors of ``averaged``.

        Args:
            saved_by: ``{"plan": ..., "world_size": ...}`` of the run that saved.

        Raises: CheckpointError if this plan or process count cannot read it.
        """

    @property
    def local_sizes(self) -> dict[str, int]:
        """Elements that this rank holds: ``{"parameters": ..., "optimizer": ...}`` (tests, memory reports)."""
        raise NotImplementedError


def build_plan(task: Task, model: nn.Module, config: TrainerConfig, parallel: Parallel, precision: str) -> Plan:
    """Prepares ``model`` as ``config.parallel`` says, with its optimizer."""
    model.to(parallel.device)
    prepare(task, model, config, parallel, precision)
    if config.parallel.plan.startswith("zero"):
        from common.zero import ZeroPlan

        return ZeroPlan(task, model, config, parallel)
    return TorchPlan(task, model, config, parallel)


def prepare(task: Task, model: nn.Module, config: TrainerConfig, parallel: Parallel, precision: str) -> None:
    """Activation checkpointing, then compilation, then autocast. Changes ``forward`` only: parameter names stay."""
    blocks = task.repeated_blocks(model)
    if config.parallel.activation_checkpointing:
        if not blocks:
            raise ConfigError(
                f"parallel.activation_checkpointing=true, but {type(model).__name__} names no repeated blocks; "
                "switch it off, or let the task's repeated_blocks return them."
            )
        for block in blocks:
            # keeps the random state, so that dropout draws the same mask again in the recomputation
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=True)
    if config.parallel.compile:
        if config.parallel.plan == "zero3":
            raise ConfigError(
                "parallel.compile=true does not work with parallel.plan=zero3, which fetches parameters in hooks; "
                "use parallel=fsdp2 or switch compilation off."
            )
        for module in blocks or [model]:
            # forward, not the module: the hooks that gather and free sharded parameters stay outside the graph
            module.forward = torch.compile(module.forward)
    autocast_forward(model, precision, parallel.device)


class TorchPlan(Plan):
    """One process, DDP or FSDP2. All three write the same checkpoint, so a run may change between them."""

    def __init__(self, task: Task, model: nn.Module, config: TrainerConfig, parallel: Parallel) -> None:
        self.module = self.model = model
        self.parallel = parallel
        self.clip = config.optim.grad_clip
        self.forward_is_collective = config.parallel.plan == "fsdp2"
        if self.forward_is_collective:
            self._shard(task)
        elif parallel.world_size > 1:
            self.model = nn.parallel.DistributedDataParallel(
                model,
                device_ids=[parallel.local_rank] if parallel.device.type == "cuda" else None,
                # constant tables need no broadcast in every step; running statistics do
                broadcast_buffers=any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()),
                gradient_as_bucket_view=True,
            )
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = build_optimizer(
            task.param_groups(model, config.optim.weight_decay), config.optim, parallel.device
        )

    def _shard(self, task: Task) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.parallel.device.type, (self.parallel.world_size,))
        for block in task.repeated_blocks(self.module):
            fully_shard(block, mesh=mesh)
        fully_shard(self.module, mesh=mesh)

    def accumulate(self, last: bool) -> contextlib.AbstractContextManager:
        # FSDP2 reduces after every micro-batch: waiting would keep whole gradients on each rank
        if isinstance(self.model, nn.parallel.DistributedDataParallel) and not last:
            return self.model.no_sync()
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @torch.no_grad()
    def step(self, rate: float, gradient_scale: float = 1.0) -> float:
        gradients = [p.grad for p in self.named.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        total = norm.item() / gradient_scale
        if total < float("inf"):
            shrink = min(self.clip / (total + 1e-6), 1.0) if self.clip >= 0 else 1.0
            if shrink != 1.0 or gradient_scale != 1.0:
                locals_ = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
                torch._foreach_mul_(locals_, shrink / gradient_scale)
            set_learning_rate(self.optimizer, rate)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def tracked(self) -> dict[str, Tensor]:
        return dict(self.named)

    def forget_gathered(self) -> None:
        from torch.distributed.fsdp import FSDPModule

        for module in self.module.modules():
            if isinstance(module, FSDPModule):  # the root stays gathered after a forward pass without backward
                module.reshard()

    def full_state(self, everywhere: bool = False) -> dict[str, Tensor]:
        whole = {}
        for name, value in self.module.state_dict().items():
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if self.parallel.is_main or everywhere:
                whole[name] = value.detach().cpu()
        return whole

    def save(self, folder: Path, averaged: Mapping[str, Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {f"model.{name}": value for name, value in self.module.state_dict().items()}
        state |= {f"optimizer.{key}": value for key, value in optimizer_tensors(self.named, self.optimizer).items()}
        state |= {f"ema.{name}": value for name, value in averaged.items()}
        writer = FileSystemWriter(folder, sync_files=False)  # the caller syncs all files of a checkpoint
        with _quiet():
            dcp.save(state, storage_writer=writer, no_dist=not dist.is_initialized())

    def load(self, folder: Path, averaged: Mapping[str, Tensor], saved_by: Mapping) -> None:
        if saved_by["plan"].startswith("zero"):
            raise CheckpointError(
                f"{folder.parent} was saved by parallel.plan={saved_by['plan']}, whose optimizer state only the same "
                f"plan can read, not {self.parallel.plan}; resume with parallel={saved_by['plan']}."
            )
        reader = FileSystemReader(folder)
        saved_keys = reader.read_metadata().state_dict_metadata
        prefix = "optimizer."
        state = {f"model.{name}": value for name, value in self.module.state_dict().items()}
        state |= {f"ema.{name}": value for name, value in averaged.items()}
        wanted = [key.removeprefix(prefix) for key in saved_keys if key.startswith(prefix)]
        state |= {
            prefix + key: value for key, value in empty_optimizer_tensors(self.named, self.optimizer, wanted).items()
        }
        unknown = [key for key in state if key not in saved_keys] + [key for key in saved_keys if key not in state]
        if unknown:
            raise CheckpointError(
                f"{folder.parent} does not fit this model: {', '.join(sorted(unknown)[:5])} "
                f"{'is' if len(unknown) == 1 else 'are'} not in both. Resume with the model it was saved from."
            )
        for key, value in state.items():
            saved_shape = tuple(saved_keys[key].size)
            if saved_shape != tuple(value.shape):
                raise CheckpointError(
                    f"{folder.parent}: {key} has shape {saved_shape}, the model's is {tuple(value.shape)}; "
                    "resume with the model size it was saved from, or choose a new run_dir."
                )
        with _quiet():
            dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())

    @property
    def local_sizes(self) -> dict[str, int]:
        held = [p.to_local() if isinstance(p, DTensor) else p for p in self.named.values()]
        states = [
            v.to_local() if isinstance(v, DTensor) else v
            for state in self.optimizer.state.values()
            for v in state.values()
            if v.ndim
        ]
        return {"parameters": sum(t.numel() for t in held), "optimizer": sum(t.numel() for t in states)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """One process is fine for us, and torch would log two debug lines per tensor."""
    logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
