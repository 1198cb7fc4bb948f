"""What a training step of the hypernetwork computes: sampled networks, their predicted weights, their loss on one
mini-batch.

A batch holds the places of the meta-batch that are this process's. Which networks stand there follows from (seed,
step, place), so neither accumulation nor the number of processes changes a step.

Dimensions: m networks of the meta-batch, B of a micro-batch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from common.seeding import generator
from common.task import Batch, Draws, StepOutput, Task
from logah.architecture_sets import ArchitectureSource
from logah.meta_learner import MetaLearner
from logah.model_config import HyperNetworkConfig
from logah.networks import Network, NetworkCache, build_afresh

PLACES = ("slot", "step", "rows")
CLASS_TOKEN = "class token in training"


class HyperNetworkTask(Task):
    """Training of a hypernetwork.

    Args:
        build: makes the model.
        source: draws the networks of a step; None for estimates.
        norm_penalty: weight of the sum of the norms of all predicted parameters.
        scheme: ``reference`` builds every network with values, traces it again and decodes whole factors, as released.
    """

    def __init__(
        self,
        config: HyperNetworkConfig,
        *,
        build: Callable[[], MetaLearner],
        source: ArchitectureSource | None,
        seed: int,
        norm_penalty: float,
        label_smoothing: float = 0.0,
        scheme: str = "fast",
    ) -> None:
        self.config, self.build, self.source, self.seed = config, build, source, seed
        self.norm_penalty, self.label_smoothing, self.scheme = norm_penalty, label_smoothing, scheme
        self.cache = NetworkCache(config, seed=seed)

    def build_model(self) -> nn.Module:
        return self.build()

    def draw(self, step: int, size: int) -> dict[str, torch.Tensor]:
        """Networks and class tokens have generators of their own, named after step and place."""
        return {"place": torch.arange(size)}

    def networks(self, step: int, slots: Sequence[int]) -> list[Network]:
        """The networks at these places of the meta-batch of ``step``."""
        drawn = self.source.draw(step, slots)
        if self.scheme == "reference":
            return [build_afresh(architecture, self.config) for architecture in drawn]
        return [self.cache(architecture) for architecture in drawn]

    def count(self, batch: Batch, draws: Draws) -> float:
        """Networks."""
        return float(len(batch["slot"]))

    def training_step(self, model: nn.Module, batch: Batch, draws: Draws) -> StepOutput:
        step, slots = int(batch["step"][0]), batch["slot"].tolist()
        data = {name: value for name, value in batch.items() if name not in PLACES}
        noise = None
        if self.config.class_token_noise:
            noise = [generator(self.seed, CLASS_TOKEN, step, slot) for slot in slots]
        total, found = model(
            self.networks(step, slots),
            [data] * len(slots),
            norm_penalty=self.norm_penalty,
            label_smoothing=self.label_smoothing,
            generators=noise,
            scheme="full" if self.scheme == "reference" else "exact",
        )
        metrics = {
            "task_loss": (found.task_sum, float(len(slots))),
            "parameter_norm": (found.norm_sum, float(len(slots))),
            "top1": (found.correct, float(found.counted)),
            "top5": (found.correct_top5, float(found.counted)),
        }
        return StepOutput(loss_sum=total, metrics=metrics)

    def repeated_blocks(self, model: nn.Module) -> list[nn.Module]:
        return model.blocks
