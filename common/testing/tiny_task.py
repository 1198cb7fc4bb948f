"""A task small enough to train in milliseconds, with an in-memory loader: what the engine's own tests run on.

B batch, D width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from common.config import BatchConfig, CheckpointConfig, OptimConfig, ParallelConfig, TrackingConfig, TrainerConfig
from common.seeding import generator
from common.task import Batch, Draws, StepOutput, Task

WIDTH = 8


class TinyBlock(nn.Module):
    """Residual layer with a scale of its own, so that a block holds a direct parameter beside submodules."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BD: Tensor) -> Tensor:
        return x_BD + self.dropout(torch.tanh(self.linear(x_BD * self.scale)))


class TinyModel(nn.Module):
    """Residual MLP; odd output width, so that shards are uneven."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0, num_blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TinyBlock(width, dropout) for _ in range(num_blocks))
        self.head = nn.Linear(width, 3)
        self.register_buffer("table", torch.arange(width, dtype=torch.float32))

    def forward(self, x_BD: Tensor) -> Tensor:
        x_BD = x_BD + 0.01 * self.table
        for block in self.blocks:
            x_BD = block(x_BD)
        return self.head(x_BD)


class TinyTask(Task):
    """Masked regression: each sample counts a random number of its three outputs, possibly none.

    Args:
        poison_step: the loss of one row of this step (from 0) is NaN.
    """

    def __init__(
        self, seed: int = 0, *, dropout: float = 0.0, width: int = WIDTH, poison_step: int | None = None
    ) -> None:
        self.seed, self.dropout, self.width, self.poison_step = seed, dropout, width, poison_step

    def build_model(self) -> nn.Module:
        return TinyModel(self.width, self.dropout)

    def draw(self, step: int, size: int) -> dict[str, Tensor]:
        rng = generator(self.seed, "mask", step)
        poison_B = torch.zeros(size)
        if step == self.poison_step:
            poison_B[1] = float("nan")
        return {"where": torch.rand(size, 3, generator=rng) < 0.5, "poison": poison_B}

    def count(self, batch: Batch, draws: Draws) -> float:
        return float(draws["where"].sum())

    def training_step(self, model: nn.Module, batch: Batch, draws: Draws) -> StepOutput:
        error = (model(batch["x"]) - batch["y"]).square() * draws["where"] + draws["poison"][:, None]
        return StepOutput(error.sum(), {"masked": (draws["where"].sum(), float(draws["where"].numel()))})

    def samples_to_tokens(self) -> int | None:
        return 3

    def flops_per_sample(self, model: nn.Module) -> float | None:
        return 6.0 * sum(p.numel() for p in model.parameters())


def _samples(seed: int, positions: Tensor, width: int) -> dict[str, Tensor]:
    x_BD = torch.stack([torch.randn(width, generator=generator(seed, "sample", int(p))) for p in positions])
    return {"x": x_BD, "y": torch.stack([x_BD[:, 0] * x_BD[:, 1], x_BD.sum(-1).sin(), x_BD[:, 2]], dim=-1)}


class TinyLoader:
    """Endless micro-batches of a synthetic stream, with the trainer's row layout and a resumable position."""

    def __init__(
        self,
        *,
        global_size: int,
        micro_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        width: int = WIDTH,
    ) -> None:
        self.global_size, self.micro_size, self.rank, self.world_size = global_size, micro_size, rank, world_size
        self.seed, self.width = seed, width
        self.accumulation = global_size // (micro_size * world_size)
        self.taken = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            step, index = divmod(self.taken, self.accumulation)
            self.taken += 1
            first = step * self.global_size + (index * self.world_size + self.rank) * self.micro_size
            yield _samples(self.seed, torch.arange(first, first + self.micro_size), self.width)

    def state_dict(self) -> dict:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict) -> None:
        self.taken = state["taken"]

    def seek(self, step: int) -> None:
        self.taken = step * self.accumulation


class TinyValidation:
    """``num_batches`` fixed batches shared out in turn."""

    def __init__(self, num_batches: int = 3, size: int = 4, width: int = WIDTH) -> None:
        self.num_batches, self.size, self.width = num_batches, size, width

    def batches(self, rank: int, world_size: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        for index in range(rank, self.num_batches, world_size):
            positions = torch.arange(index * self.size, (index + 1) * self.size)
            yield index, _samples(999, positions, self.width)


def tiny_config(run_dir: object, *, plan: str = "none", world_size: int = 1, **overrides: object) -> TrainerConfig:
    """A float32 configuration for the tiny task: 8 samples per step in micro-batches of 2, clipping, warm-up, EMA.

    Args:
        overrides: fields of ``TrainerConfig``; ``parallel`` options as ``{"compile": True}`` dictionaries.
    """
    parallel = overrides.pop("parallel", {})
    settings = {
        "run_dir": str(run_dir),
        "total_steps": 6,
        "batch": BatchConfig(global_size=8, micro_size=2),
        "optim": OptimConfig(lr=1e-2, warmup=3, grad_clip=0.5, weight_decay=0.1, schedule="cosine"),
        "parallel": ParallelConfig(plan=plan, **parallel),
        "checkpoint": CheckpointConfig(interval_steps=2, keep_last=3),
        "tracking": TrackingConfig(progress=False),
        "precision": "fp32",
        "ema_decay": 0.9,
        "log_interval_steps": 3,
    }
    return TrainerConfig(**(settings | overrides))


def tiny_loader(config: TrainerConfig, rank: int = 0, world_size: int = 1) -> TinyLoader:
    """The loader that fits ``tiny_config``."""
    return TinyLoader(
        global_size=config.batch.global_size, micro_size=config.batch.micro_size, rank=rank, world_size=world_size
    )
