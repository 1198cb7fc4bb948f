"""DeepSpeed's ZeRO stages 1 to 3 behind the ``Plan`` interface: torch's AdamW, float32 master weights.

DeepSpeed owns the sharding, the reduction and the clipping; autocast, learning rate, moving average and checkpoint
files stay with the engine, so that every plan behaves alike. Saving goes through the optimizer's own state dict, one
file per rank, and not through DeepSpeed's ``save_checkpoint``, which waits for ever when one rank's disk is full.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.checkpoint import MODEL_FILE, read_weights
from common.config import TrainerConfig
from common.errors import CheckpointError, ConfigError
from common.optim import build_optimizer, set_learning_rate
from common.parallel import Parallel
from common.plans import Plan
from common.task import Task


def _import_deepspeed():
    """DeepSpeed, without its log lines and without building CUDA kernels."""
    os.environ.setdefault("DS_BUILD_OPS", "0")
    os.environ.setdefault("LOCAL_RANK", "0")  # asked for even in one process
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        import deepspeed
    except ImportError:
        raise ConfigError(
            "parallel.plan=zero1|zero2|zero3 needs DeepSpeed, which is not installed; `pip install deepspeed` (with "
            "DS_BUILD_OPS=0), or use parallel=fsdp2."
        ) from None
    # on the CPU DeepSpeed would compile a shared-memory reduction at first use (80 s, needs a C++ compiler); gloo does
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class ZeroPlan(Plan):
    """One DeepSpeed engine. Stage 1 shards optimizer states, 2 gradients as well, 3 parameters as well."""

    def __init__(self, task: Task, model: nn.Module, config: TrainerConfig, parallel: Parallel) -> None:
        with _quiet():
            self._deepspeed = _import_deepspeed()
        self.module, self.parallel = model, parallel
        self.stage = int(config.parallel.plan.removeprefix("zero"))
        self.forward_is_collective = self.stage == 3
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        optimizer = build_optimizer(task.param_groups(model, config.optim.weight_decay), config.optim, parallel.device)
        with _quiet():
            self.model, self.optimizer, _, _ = self._deepspeed.initialize(
                model=model, optimizer=optimizer, config=self._settings(config), dist_init_required=False
            )

    def _settings(self, config: TrainerConfig) -> dict:
        # DeepSpeed allocates whole buckets of 5e8 elements however small the model
        elements = sum(p.numel() for p in self.module.parameters())
        zero = {"stage": self.stage, "reduce_bucket_size": min(elements, 500_000_000)}
        if self.stage == 3:
            # shard small parameters too: the moving average and its swap see shards only
            zero["stage3_param_persistence_threshold"] = 0
        return {
            "train_micro_batch_size_per_gpu": config.batch.micro_size,
            "gradient_accumulation_steps": 1,  # the trainer divides the loss and says which micro-batch is the last
            "gradient_clipping": max(config.optim.grad_clip, 0.0),
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**12,
        }

    @contextlib.contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(last)
        yield
        if not last:
            self.model.step()  # only moves DeepSpeed's micro-batch counter

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def step(self, rate: float, gradient_scale: float = 1.0) -> float:
        assert gradient_scale == 1.0, "loss scaling is refused for ZeRO plans"
        set_learning_rate(self.optimizer, rate)
        self.model.step()  # DeepSpeed itself leaves the weights alone when the norm is not finite
        return float("nan") if self.optimizer.overflow else float(self.model.get_global_grad_norm())

    def _parameters(self) -> dict[str, nn.Parameter]:
        wanted = set(self.names)
        return {name: p for name, p in self.module.named_parameters() if name in wanted}

    def tracked(self) -> dict[str, Tensor]:
        if self.stage == 3:
            return {name: p.ds_tensor for name, p in self._parameters().items()}
        return dict(self._parameters())

    def forget_gathered(self) -> None:
        if self.stage == 3:
            self.optimizer.empty_partition_cache()  # the engine's method of that name also collects garbage, 0.5 s

    def full_state(self, everywhere: bool = False) -> dict[str, Tensor]:
        keep = everywhere or self.parallel.is_main
        if self.stage < 3:
            return {name: value.detach().cpu() for name, value in self.module.state_dict().items()} if keep else {}
        self.forget_gathered()
        whole = {}
        for name, value in self.module.state_dict(keep_vars=True).items():
            is_sharded = hasattr(value, "ds_id")
            gathered = self._deepspeed.zero.GatheredParameters([value]) if is_sharded else contextlib.nullcontext()
            with gathered:
                if keep:
                    whole[name] = value.detach().cpu().clone()
        return whole

    def save(self, folder: Path, averaged: Mapping[str, Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {"optimizer": self.optimizer.state_dict(), "averaged": dict(averaged) if self.stage == 3 else {}}
        if self.parallel.is_main and self.stage < 3:
            state["averaged"] = dict(averaged)  # whole on every rank: once is enough
        torch.save(state, _state_file(folder, self.parallel.rank))

    @torch.no_grad()
    def load(self, folder: Path, averaged: Mapping[str, Tensor], saved_by: Mapping) -> None:
        mine = {"plan": f"zero{self.stage}", "world_size": self.parallel.world_size}
        differs = [f"{key} {saved_by[key]}, not {value}" for key, value in mine.items() if saved_by[key] != value]
        if differs:
            raise CheckpointError(
                f"{folder.parent} was saved with {' and '.join(differs)}; DeepSpeed's shards fit no other run. Resume "
                f"with parallel={saved_by['plan']} on {saved_by['world_size']} processes (parallel=fsdp2 can change "
                "the number of processes), or start a new run_dir."
            )
        # pickled, but verified: the manifest of this run's own folder was checked before
        state = _read(_state_file(folder, self.parallel.rank))
        if self.stage == 3:
            self.forget_gathered()
            self.optimizer.load_state_dict({dist.get_rank(): state["optimizer"]})
            self._load_buffers(read_weights(folder.parent / MODEL_FILE))
        else:
            self.module.load_state_dict(read_weights(folder.parent / MODEL_FILE))
            # float32 throughout: the masters are refilled from the weights without loss
            self.optimizer.load_state_dict({dist.get_rank(): state["optimizer"]})
            state["averaged"] = state["averaged"] or _read(_state_file(folder, 0))["averaged"]
        for name, shard in averaged.items():
            shard.copy_(state["averaged"][name])

    def _load_buffers(self, weights: Mapping[str, Tensor]) -> None:
        for name, buffer in self.module.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])

    @property
    def local_sizes(self) -> dict[str, int]:
        inner = self.optimizer.optimizer
        states = [v for state in inner.state.values() for v in state.values() if isinstance(v, Tensor) and v.ndim]
        return {
            "parameters": sum(t.numel() for t in self.tracked().values()),
            "optimizer": sum(t.numel() for t in states),
        }


def _state_file(folder: Path, rank: int) -> Path:
    return folder / f"zero_rank_{rank:05d}.pt"


def _read(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed greets with dozens of lines on every rank, and tries out linkers; exceptions still come through."""
    sys.stderr.flush()
    kept = os.dup(2)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)
    os.close(silent)
    loggers = [logging.getLogger(name) for name in ("DeepSpeed", "torch.utils.cpp_extension")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
