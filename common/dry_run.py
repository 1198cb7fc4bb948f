"""What a run would cost, without allocating a weight: parameters, operations per step, memory per process by plan.

The model is built on the ``meta`` device. Activations are measured, not guessed: the forward pass runs on fake tensors
(shapes and dtypes only) and what autograd would keep for the backward pass is added up. Temporary buffers of kernels,
of communication and of the allocator come on top; expect the real peak some tens of percent above the total.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from common.adamw8bit import STATE_BYTES
from common.config import PLANS, WHOLE_PARAMETER_PLANS, TrainerConfig
from common.precision import resolve_precision
from common.task import Task

FLOAT_BYTES = 4  # parameters, gradients, Adam's states and moving average are float32 under every precision
ADAM_BYTES = 2 * FLOAT_BYTES  # per parameter
ZERO3_LIVE_PARAMETERS = 10**9  # DeepSpeed's default for stage3_max_live_parameters: so many stay gathered
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Forward = Callable[[nn.Module, int], object]
"""Runs the model on ``n`` made-up samples; its result is thrown away."""


@dataclass(frozen=True)
class PlanMemory:
    """Bytes per process of one plan.

    Attributes:
        gathered: whole parameters (and gradients) that a sharded plan holds for a moment.
        activations: None if the task gave no forward pass to measure.
    """

    plan: str
    world_size: int
    micro_size: int
    parameters: int
    gradients: int
    optimizer: int
    averaged: int
    gathered: int
    activations: int | None

    @property
    def total(self) -> int:
        parts = (self.parameters, self.gradients, self.optimizer, self.averaged, self.gathered, self.activations or 0)
        return sum(parts)


@dataclass(frozen=True)
class Estimate:
    """Cost of a run; ``flops_per_step`` is None if the task does not know it."""

    parameters: int
    trainable: int
    flops_per_step: float | None
    tokens_per_step: int | None
    total_steps: int
    precision: str
    plans: tuple[PlanMemory, ...]


def estimate(
    task: Task, config: TrainerConfig, *, micro_sizes: dict[int, int], forward: Forward | None = None
) -> Estimate:
    """Cost of training ``task`` as ``config`` says.

    Args:
        micro_sizes: world size -> samples per process and forward pass; the plan ``none`` is shown for 1 process, the
            others for the world sizes above 1.
        forward: used to measure activations, on fake tensors.
    """
    with torch.device("meta"):
        model = task.build_model()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trainable
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # a plan's refusal of a precision is the training run's to report
    precision = resolve_precision(config.precision, device)
    block_sizes = [sum(p.numel() for p in block.parameters()) for block in task.repeated_blocks(model)]
    is_8bit = config.optim.optimizer == "AdamW8bit"
    plans = []
    for world_size, micro_size in sorted(micro_sizes.items()):
        activations = activation_bytes(task, config, micro_size, precision, forward) if forward else None
        for plan in WHOLE_PARAMETER_PLANS if is_8bit else PLANS:
            if (plan == "none") == (world_size == 1):
                plans.append(
                    plan_memory(
                        plan,
                        world_size,
                        micro_size,
                        trainable=trainable,
                        frozen=frozen,
                        block_sizes=block_sizes,
                        has_ema=config.ema_decay is not None,
                        activations=activations,
                        optimizer_bytes=STATE_BYTES if is_8bit else ADAM_BYTES,
                    )
                )
    flops, tokens = task.flops_per_sample(model), task.samples_to_tokens()
    return Estimate(
        parameters=trainable + frozen,
        trainable=trainable,
        flops_per_step=None if flops is None else flops * config.batch.global_size,
        tokens_per_step=None if tokens is None else tokens * config.batch.global_size,
        total_steps=config.total_steps,
        precision=precision,
        plans=tuple(plans),
    )


def plan_memory(
    plan: str,
    world_size: int,
    micro_size: int,
    *,
    trainable: int,
    frozen: int = 0,
    block_sizes: Sequence[int] = (),
    has_ema: bool = True,
    activations: int | None = None,
    optimizer_bytes: float = ADAM_BYTES,
) -> PlanMemory:
    """Bytes per process under ``plan``, from element counts.

    Args:
        trainable, frozen: parameters of the whole model.
        block_sizes: parameters of each repeated block, which sharded plans gather one by one.
        optimizer_bytes: optimizer state per trainable parameter.
    """

    def share(elements: int, is_sharded: bool) -> int:
        return -(-elements // world_size) * FLOAT_BYTES if is_sharded else elements * FLOAT_BYTES

    shards_parameters = plan in ("fsdp2", "zero3")
    shards_gradients = plan in ("fsdp2", "zero2", "zero3")
    shards_optimizer = plan not in ("none", "ddp")
    # DeepSpeed keeps a float32 copy of the weights beside Adam's two states
    optimizer_bytes += FLOAT_BYTES if plan.startswith("zero") else 0
    gathered = 0
    if plan == "fsdp2":
        largest, rest = max(block_sizes, default=0), trainable + frozen - sum(block_sizes)
        # the block at work and the next one, whatever is in no block, and whole gradients until they are reduced
        gathered = 2 * largest + rest + max(largest, rest)
    elif plan == "zero3":
        gathered = min(trainable + frozen, ZERO3_LIVE_PARAMETERS)
    return PlanMemory(
        plan=plan,
        world_size=world_size,
        micro_size=micro_size,
        parameters=share(trainable + frozen, shards_parameters),
        gradients=share(trainable, shards_gradients),
        optimizer=round(share(trainable, shards_optimizer) * optimizer_bytes / FLOAT_BYTES),
        averaged=share(trainable, shards_parameters) if has_ema else 0,
        gathered=gathered * FLOAT_BYTES if world_size > 1 else 0,
        activations=activations,
    )


def activation_bytes(task: Task, config: TrainerConfig, micro_size: int, precision: str, forward: Forward) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of one micro-batch, weights aside."""
    with FakeTensorMode():
        model = task.build_model().train()
        blocks = task.repeated_blocks(model)
        autocast = contextlib.nullcontext()
        if precision in DTYPES:
            autocast = torch.autocast("cpu", dtype=DTYPES[precision])

        def kept(run: Callable[[], object]) -> int:
            weights = {value.untyped_storage()._cdata for value in model.state_dict().values()}
            sizes: dict[int, int] = {}
            alive = []  # a freed storage's address would be given to the next one

            def keep(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in weights:
                    sizes[storage._cdata] = storage.nbytes()
                    alive.append(tensor)
                return tensor

            with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                alive.append(run())
            return sum(sizes.values())

        whole = kept(lambda: forward(model, micro_size))
        if not config.parallel.activation_checkpointing or not blocks:
            return whole
        for block in blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        inputs_only = kept(lambda: forward(model, micro_size))
        # in the backward pass one block at a time is computed again
        return inputs_only + (whole - inputs_only) // len(blocks)


def print_estimate(found: Estimate, console: Console | None = None) -> None:
    """The estimate as text: one line per fact, then one table row per plan."""
    console = console or Console(width=max(100, Console().width))
    console.print(f"parameters        {found.parameters:,} ({found.trainable:,} trainable)", highlight=False)
    if found.flops_per_step is not None:
        run = found.flops_per_step * found.total_steps
        console.print(
            f"operations        {found.flops_per_step:.3g} FLOP per step, {run:.3g} in {found.total_steps:,} steps",
            highlight=False,
        )
    if found.tokens_per_step is not None:
        tokens = found.tokens_per_step * found.total_steps
        console.print(f"tokens            {found.tokens_per_step:,} per step, {tokens:.3g} in all", highlight=False)
    console.print(f"precision         {found.precision} on this machine", highlight=False)
    console.print(
        "estimated memory per process in GB (10^9 bytes); rows each: samples of one forward pass", highlight=False
    )
    table = Table(box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    table.add_column("parallel", no_wrap=True)
    columns = (
        "processes",
        "rows each",
        "weights",
        "gradients",
        "optimizer",
        "EMA",
        "gathered",
        "activations",
        "total",
    )
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.plans:
        parts = (row.parameters, row.gradients, row.optimizer, row.averaged, row.gathered, row.activations, row.total)
        table.add_row(row.plan, str(row.world_size), str(row.micro_size), *map(_gigabytes, parts))
    console.print(table)


def _gigabytes(size: int | None) -> str:
    if size is None:
        return "?"
    return f"{size / 1e9:.2f}" if size >= 1e7 or not size else f"{size / 1e9:.1g}"
