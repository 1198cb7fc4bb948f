"""The dry run counts what a run would need without allocating it; where that is small, the real run agrees."""

import resource
from io import StringIO

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from common.adamw8bit import STATE_BYTES
from common.config import BatchConfig, OptimConfig, ParallelConfig, TrainerConfig
from common.dry_run import activation_bytes, estimate, plan_memory, print_estimate
from common.task import StepOutput, Task

WIDTH, DEPTH = 32, 3


class Perceptron(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class PerceptronTask(Task):
    def __init__(self, width: int = WIDTH) -> None:
        self.width = width

    def build_model(self) -> nn.Module:
        return Perceptron(self.width)

    def draw(self, step: int, size: int) -> dict[str, Tensor]:
        return {}

    def training_step(self, model, batch, draws) -> StepOutput:
        return StepOutput(loss_sum=model(batch["x"]).sum())

    def flops_per_sample(self, model: nn.Module) -> float:
        return 100.0


def config(**options) -> TrainerConfig:
    return TrainerConfig(
        run_dir="unused", total_steps=10, batch=BatchConfig(global_size=16, micro_size=4), precision="fp32", **options
    )


def forward(model: nn.Module, rows: int) -> Tensor:
    return model(torch.zeros(rows, next(model.parameters()).shape[1]))


def test_counts_parameters_and_operations():
    found = estimate(PerceptronTask(), config(), micro_sizes={1: 16, 4: 4}, forward=forward)
    assert found.parameters == found.trainable == DEPTH * (WIDTH**2 + WIDTH)
    assert found.flops_per_step == 1600
    assert [row.plan for row in found.plans] == ["none", "ddp", "fsdp2", "zero1", "zero2", "zero3"]


def test_memory_of_one_process_is_that_of_a_real_step():
    row = estimate(PerceptronTask(), config(), micro_sizes={1: 4}, forward=forward).plans[0]
    model = Perceptron()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(4, WIDTH)).sum().backward()
    optimizer.step()
    size = sum(p.numel() * 4 for p in model.parameters())
    states = sum(v.numel() * 4 for state in optimizer.state.values() for v in state.values() if v.ndim)
    assert (row.parameters, row.gradients, row.optimizer, row.averaged, row.gathered) == (size, size, states, size, 0)


def test_activations_are_what_autograd_keeps():
    kept = activation_bytes(PerceptronTask(), config(), 4, "fp32", forward)
    # every linear layer keeps its input, every GELU its own
    assert kept == 2 * DEPTH * 4 * WIDTH * 4


def test_activations_grow_with_the_micro_batch_and_shrink_by_recomputation():
    task = PerceptronTask()
    kept = activation_bytes(task, config(), 8, "fp32", forward)
    assert kept == 2 * activation_bytes(task, config(), 4, "fp32", forward)
    recomputed = config(parallel=ParallelConfig(activation_checkpointing=True))
    assert activation_bytes(task, recomputed, 8, "fp32", forward) < kept


@pytest.mark.parametrize(
    "plan,parts",
    [  # parameters, gradients, optimizer, average: shares of the whole, 8 processes
        ("ddp", (1, 1, 2, 1)),
        ("fsdp2", (1 / 8, 1 / 8, 2 / 8, 1 / 8)),
        ("zero1", (1, 1, 3 / 8, 1)),
        ("zero2", (1, 1 / 8, 3 / 8, 1)),
        ("zero3", (1 / 8, 1 / 8, 3 / 8, 1 / 8)),
    ],
)
def test_plans_shard_what_they_say(plan: str, parts: tuple[float, ...]):
    elements = 8000
    row = plan_memory(plan, 8, 4, trainable=elements, block_sizes=[1000] * 7)
    got = (row.parameters, row.gradients, row.optimizer, row.averaged)
    assert got == tuple(4 * elements * part for part in parts)
    assert (row.gathered > 0) == (plan in ("fsdp2", "zero3"))
    assert row.total == sum(got) + row.gathered


def test_a_run_without_average_needs_less():
    kept = plan_memory("ddp", 2, 1, trainable=1000)
    assert kept.total - plan_memory("ddp", 2, 1, trainable=1000, has_ema=False).total == 4000


def test_nothing_of_a_huge_model_is_allocated():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = estimate(PerceptronTask(width=40_000), config(), micro_sizes={1: 64, 8: 8}, forward=forward)
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert found.parameters * 4 > 19e9
    assert grown_mb < 300


def test_the_table_names_every_plan_and_its_total():
    text = StringIO()
    found = estimate(
        PerceptronTask(width=4000), config(optim=OptimConfig()), micro_sizes={1: 16, 8: 2}, forward=forward
    )
    print_estimate(found, Console(file=text, width=100))
    lines = text.getvalue().splitlines()
    assert lines[0] == "parameters        48,012,000 (48,012,000 trainable)"
    for row in found.plans:
        [line] = [line for line in lines if line.split() and line.split()[0] == row.plan]
        assert line.split()[-1] == f"{row.total / 1e9:.2f}"
    assert not any("…" in line for line in lines)


def test_8bit_states_are_a_quarter_and_only_of_plans_that_hold_whole_parameters():
    whole = plan_memory("ddp", 2, 1, trainable=100_000)
    small = plan_memory("ddp", 2, 1, trainable=100_000, optimizer_bytes=STATE_BYTES)
    assert whole.optimizer == 800_000
    assert small.optimizer == 203_125
    assert whole.total - small.total == whole.optimizer - small.optimizer
