"""The contract between the engine, which decides *when*, and a paper, which decides *what*.

The engine (``common/trainer.py``) calls, for every optimizer step:

1. ``task.draw(step, size)`` once: all random numbers of the *global* batch, on the CPU;
2. ``task.count(batch, draws)`` for every micro-batch, before any forward pass: the number that the loss is divided by,
   summed over micro-batches and ranks;
3. ``task.training_step(model, batch, draws)`` for every micro-batch, with the rows of ``draws`` that belong to it.

``model`` is the wrapped module (DDP, FSDP2, DeepSpeed): a task only ever *calls* it, so that the wrapper's hooks run.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

Batch = Mapping[str, Tensor]
"""Named tensors whose first dimension is the micro-batch, e.g. ``{"tokens": (B, L) int64}``."""

Draws = Mapping[str, Tensor]
"""Named random tensors whose first dimension is the global batch (in ``training_step``: the micro-batch).

The engine adds ``"rows"``: the global sample indices of the micro-batch, int64 ``(B,)``.
"""


@dataclass(frozen=True)
class StepOutput:
    """What one forward pass yields.

    Attributes:
        loss_sum: scalar float32, differentiable; the engine divides by the summed ``Task.count``.
        metrics: name -> (sum, weight); logged as the weighted mean over micro-batches, ranks and logging steps.
    """

    loss_sum: Tensor
    metrics: Mapping[str, tuple[Tensor, float]] = field(default_factory=dict)


class Task(ABC):
    """What a paper supplies to be trained. It has no loop, no ``backward``, no rank and writes no file."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """A freshly initialised float32 model (the engine has seeded torch's global generator for it)."""

    @abstractmethod
    def draw(self, step: int, size: int) -> dict[str, Tensor]:
        """Random numbers of the global batch of optimizer step ``step`` (from 0): CPU, first dimension ``size``."""

    @abstractmethod
    def training_step(self, model: nn.Module, batch: Batch, draws: Draws) -> StepOutput:
        """Summed loss of one micro-batch; calls ``model`` exactly once."""

    def validation_draw(self, index: int, size: int) -> dict[str, Tensor]:
        """Random numbers of validation batch ``index``: fixed over training, so that curves are comparable."""
        return self.draw(-1 - index, size)

    def validation_step(self, model: nn.Module, batch: Batch, draws: Draws) -> StepOutput:
        """Summed loss of one validation micro-batch, without gradient; by default the training loss."""
        return self.training_step(model, batch, draws)

    def count(self, batch: Batch, draws: Draws) -> float:
        """What the loss sum of this micro-batch is divided by (before the sum over ranks): samples by default."""
        return float(len(next(iter(batch.values()))))

    def param_groups(self, model: nn.Module, weight_decay: float) -> list[dict]:
        """Optimizer groups ``{"params": [...], "weight_decay": ...}``; by default one of all trainable parameters."""
        return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": weight_decay}]

    def repeated_blocks(self, model: nn.Module) -> list[nn.Module]:
        """The layers that sharding and activation checkpointing treat one by one: ``model.blocks`` if there is one."""
        return list(getattr(model, "blocks", []))

    def flops_per_sample(self, model: nn.Module) -> float | None:
        """Forward plus backward floating-point operations per sample, for MFU; None if unknown."""
        return None

    def samples_to_tokens(self) -> int | None:
        """Tokens in one sample, so that throughput is also logged in tokens per second; None for non-text tasks."""
        return None
