"""What RADD trains: masks drawn from (seed, purpose, step) for the global batch, one network call, a weighted NLL sum.

Dimensions: B batch, L sequence, P masked positions.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from common.diffusion.schedules import build_schedule
from common.seeding import generator
from common.task import Batch, Draws, StepOutput, Task
from radd.losses import LossConfig, corrupt, draw_loss_inputs
from radd.model import RADD, Embedding, LayerNorm, ModelConfig

if TYPE_CHECKING:
    from radd.config import TrainConfig


class RADDTask(Task):
    """Masked-diffusion training of the RADD network with any of its four losses.

    Args:
        config: needs ``seed``, ``tokens``, ``model``, ``noise`` and ``training``; see ``radd/config.py``.

    Source: specification section 4.3. Unlike the reference, time strata span the global batch, the sum is divided by
    tokens unless ``training.loss_norm=sequences``, and the generators do not depend on rank or accumulation.
    """

    def __init__(self, config: "TrainConfig") -> None:
        self.seed: int = config.seed
        self.tokens: int = config.tokens
        self.model_config: ModelConfig = config.model
        self.loss = LossConfig.from_section(config.training)
        self.schedule = build_schedule(config.noise.type, config.noise.sigma_min, config.noise.sigma_max)
        self.decay_exclude_norms: bool = config.training.decay_exclude_norms

    def build_model(self) -> RADD:
        return RADD(self.model_config, self.tokens)

    # ---------------------------------------------------------------- random numbers

    def draw(self, step: int, size: int) -> dict[str, Tensor]:
        return draw_loss_inputs(
            self.loss.loss_type,
            size,
            self.model_config.length,
            generator_for=lambda purpose: generator(self.seed, f"radd {purpose}", step),
            sampler=self.loss.time_sampler,
            antithetic=self.loss.antithetic,
        )

    def validation_draw(self, index: int, size: int) -> dict[str, Tensor]:
        """Fixed and stratified over the batch, whatever the training rule: the curve should show the model only."""
        return draw_loss_inputs(
            self.loss.loss_type,
            size,
            self.model_config.length,
            generator_for=lambda purpose: generator(self.seed, f"radd validation {purpose}", index),
            sampler="stratified",
        )

    # ---------------------------------------------------------------- steps

    def count(self, batch: Batch, draws: Draws) -> float:
        """Tokens or sequences of the micro-batch, by ``training.loss_norm``; masks do not enter."""
        rows, length = batch["tokens"].shape
        return float(rows * length if self.loss.loss_norm == "tokens" else rows)

    def training_step(self, model: nn.Module, batch: Batch, draws: Draws) -> StepOutput:
        x_BL = batch["tokens"]
        draws = {name: draw.to(x_BL.device, non_blocking=True) for name, draw in draws.items() if name != "rows"}
        corruption = corrupt(
            self.loss.loss_type,
            x_BL,
            draws,
            self.schedule,
            mask_id=self.tokens,
            sampling_eps=self.loss.sampling_eps,
            exact_range=self.loss.exact_range,
        )
        weighted_sum, nll_P = model(corruption.z_BL, x_BL, corruption.where_BL, corruption.weight_B)
        loss_sum = weighted_sum + corruption.offset_B.sum()
        tokens = float(x_BL.numel())
        masked = nll_P.shape[0]
        metrics = {
            "nats_per_token": (loss_sum.detach(), tokens),
            "masked_share": (torch.full_like(weighted_sum, masked, requires_grad=False), tokens),
            "masked_nll": (nll_P.detach().sum(), float(masked)),
        }
        return StepOutput(loss_sum=loss_sum, metrics=metrics)

    # ---------------------------------------------------------------- what the engine reports and optimises

    def param_groups(self, model: nn.Module, weight_decay: float) -> list[dict]:
        """One group with plain decay (the reference); norms, biases and embeddings exempt if so configured."""
        if not self.decay_exclude_norms:
            return super().param_groups(model, weight_decay)
        exempt = {
            id(parameter)
            for module in model.modules()
            if isinstance(module, LayerNorm | Embedding)
            for parameter in module.parameters(recurse=False)
        }
        decayed, plain = [], []
        for parameter in model.parameters():
            if parameter.requires_grad:
                (plain if id(parameter) in exempt or parameter.dim() < 2 else decayed).append(parameter)
        return [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]

    def flops_per_sample(self, model: nn.Module) -> float:
        """Operations really needed: products of the blocks, attention, and the head at the masked half.

        The last block's output projection and MLP run at masked positions only, like the head.
        """
        config = self.model_config
        length, width, blocks = config.length, config.hidden_size, config.n_blocks
        masked = 0.5 * length
        matrices = 24 * width**2 * blocks * length - 18 * width**2 * (length - masked)
        attention = 4 * length**2 * width * blocks
        head = 2 * width * self.tokens * masked
        return 3.0 * (matrices + attention + head)

    def samples_to_tokens(self) -> int:
        return self.model_config.length
