"""What an adaptation trains: noised tokens, an annealed mask, one network call, a weighted sum of cross-entropies.

Four stages share it: ``ddm`` (packed text) and ``ddm-sft`` (the prompt stays clean) by diffusion, ``pt`` and ``sft`` by
next-token prediction of the autoregressive parent. Batches hold ``tokens`` and, for pairs, ``src_mask``.

Dimensions: B batch, L sequence, P positions with a loss.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.diffusion.time_sampling import draw_times
from common.errors import ConfigError, DataError
from common.seeding import generator
from common.task import Batch, Draws, StepOutput, Task
from diffullama.attention import anneal_ratio, annealed_allowed
from diffullama.config import ObjectiveConfig
from diffullama.losses import loss_positions
from diffullama.model import DiffusionLM
from diffullama.noise import add_noise, sample_time

SAMPLER_RULES = {"stratified": "stratified", "independent": "naive"}


class AdaptationTask(Task):
    """Training of a ``DiffusionLM`` in one of the four stages.

    Args:
        build: makes the model; the engine calls it once per process.
        objective: stage, loss and annealing.
        seed: of times, masks and attention edges.
        length: L, tokens per sequence.
        opened_attention: attention backend to switch to once everything is open, e.g. ``flash_attention_2``.

    Source: specification 4.1. Unlike the reference, time strata span the global batch, ranks draw different noise, the
    loss is taken where tokens were masked (``objective.by_id`` tests for the mask's id), a batch without labels is 0,
    and validation is done with full attention at every step.
    """

    def __init__(
        self,
        build: Callable[[], DiffusionLM],
        objective: ObjectiveConfig,
        *,
        seed: int,
        length: int,
        opened_attention: str | None = None,
    ) -> None:
        self.build, self.objective, self.seed, self.length = build, objective, seed, length
        self.opened_attention = opened_attention
        self.built: DiffusionLM | None = None

    def build_model(self) -> DiffusionLM:
        model = self.build()
        if not self.objective.is_causal:
            if model.shift != self.objective.shift:
                raise ConfigError(f"objective.shift={self.objective.shift}, but the model has shift={model.shift}.")
            if model.mask_id is None:
                raise ConfigError(f"objective.stage={self.objective.stage} needs a mask: set model.mask_token_id.")
        if model.has_learnt_positions and self.length > model.max_length:
            raise ConfigError(
                f"model.length={self.length} exceeds the model's {model.max_length} positions; use fewer tokens."
            )
        self.built = self.built or model  # a later copy is a snapshot's
        return model

    # ---------------------------------------------------------------- random numbers

    def draw(self, step: int, size: int) -> dict[str, Tensor]:
        return self._draw("", step, size, SAMPLER_RULES[self.objective.time_sampler])

    def validation_draw(self, index: int, size: int) -> dict[str, Tensor]:
        """Fixed, and stratified whatever the training rule: the curve should show the model only."""
        return self._draw("validation ", index, size, "stratified")

    def _draw(self, kind: str, step: int, size: int, rule: str) -> dict[str, Tensor]:
        step_B = torch.full((size,), step)
        if self.objective.is_causal:
            return {"step": step_B}
        time_rng, mask_rng = (generator(self.seed, f"adaptation {kind}{name}", step) for name in ("time", "mask"))
        return {
            "step": step_B,
            "r": draw_times(rule, size, generator=time_rng),
            "u": torch.rand(size, self.length, generator=mask_rng),
        }

    def _allowed(self, draws: Draws, device: torch.device) -> Tensor | None:
        """The annealed mask of a micro-batch, drawn anew for each; None once attention is fully open.

        It is keyed by the step and the micro-batch's first row, so that it depends on how a batch is split (as in the
        reference), but not on ranks.
        """
        step = int(draws["step"][0])
        ratio = anneal_ratio(step, self.objective.anneal_steps)
        if ratio >= 1:
            if self.opened_attention and self.built.config._attn_implementation != self.opened_attention:
                self.built.set_attention(self.opened_attention)
            return None
        rng = generator(self.seed, "adaptation edges", step, int(draws["rows"][0]))
        return annealed_allowed(torch.rand(self.length, self.length, generator=rng), ratio).to(device)

    # ---------------------------------------------------------------- steps

    def count(self, batch: Batch, draws: Draws) -> float:
        """Labels of the micro-batch: all that could be masked (``loss_norm=tokens``), or those that are."""
        if not self.objective.is_causal and self.objective.loss_norm == "masked":
            return float(self._corrupt(batch, draws)[1].sum())
        return float(self._maskable(batch).sum())

    def _maskable(self, batch: Batch) -> Tensor:
        """bool ``(B, L)``: positions that are not given and have a prediction.

        Raises: DataError if pairs come without ``src_mask``, so that prompts would be masked.
        """
        tokens_BL = batch["tokens"]
        if "src_mask" in batch:
            free_BL = ~batch["src_mask"].bool()
        elif self.objective.is_finetuning:
            raise DataError(
                f"objective.stage={self.objective.stage} needs src_mask in its batches, else prompts would be masked; "
                "the data pipeline has lost it."
            )
        else:
            free_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
        return loss_positions(free_BL, self.objective.shift or self.objective.is_causal)

    def _corrupt(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Noised ids, positions with a loss, times."""
        x_BL = batch["tokens"]
        t_B = sample_time(draws["r"].to(x_BL.device), self.objective.time_eps)
        u_BL = draws["u"].to(x_BL.device)
        given_BL = batch["src_mask"].bool() if "src_mask" in batch else torch.zeros_like(x_BL, dtype=torch.bool)
        if self.objective.shift and self.objective.keep_first:
            given_BL = given_BL.clone()
            given_BL[:, 0] = True
        z_BL, drawn_BL = add_noise(x_BL, t_B, u_BL, self.built.mask_id, given_BL)
        if self.objective.by_id:
            drawn_BL = z_BL == self.built.mask_id
        return z_BL, loss_positions(drawn_BL, self.objective.shift), t_B

    def training_step(self, model: nn.Module, batch: Batch, draws: Draws) -> StepOutput:
        if self.objective.is_causal:
            return self._causal_step(model, batch)
        return self._diffusion_step(model, batch, draws, self._allowed(draws, batch["tokens"].device))

    def validation_step(self, model: nn.Module, batch: Batch, draws: Draws) -> StepOutput:
        if self.objective.is_causal:
            return self._causal_step(model, batch)
        return self._diffusion_step(model, batch, draws, None)

    def _diffusion_step(self, model: nn.Module, batch: Batch, draws: Draws, allowed: Tensor | None) -> StepOutput:
        z_BL, where_BL, t_B = self._corrupt(batch, draws)
        loss_sum, nll_P = model(z_BL, batch["tokens"], where_BL, 1 / t_B, allowed=allowed)
        labels, masked = float(self._maskable(batch).sum()), float(nll_P.shape[0])
        metrics = {
            "nats_per_token": (loss_sum.detach(), labels),
            "masked_nll": (nll_P.detach().sum(), masked),
            "masked_share": (torch.full_like(loss_sum.detach(), masked), labels),
        }
        if model.training:
            ratio = anneal_ratio(int(draws["step"][0]), self.objective.anneal_steps)
            metrics["anneal_ratio"] = (torch.full_like(loss_sum.detach(), ratio), 1.0)
        return StepOutput(loss_sum=loss_sum, metrics=metrics)

    def _causal_step(self, model: nn.Module, batch: Batch) -> StepOutput:
        x_BL, where_BL = batch["tokens"], self._maskable(batch)
        weight_B = torch.ones(len(x_BL), device=x_BL.device)
        loss_sum, nll_P = model(x_BL, x_BL, where_BL, weight_B, causal=True)
        return StepOutput(loss_sum=loss_sum, metrics={"nats_per_token": (loss_sum.detach(), float(nll_P.shape[0]))})

    # ---------------------------------------------------------------- what the engine reports and optimises

    def param_groups(self, model: nn.Module, weight_decay: float) -> list[dict]:
        """Two groups: matrices with decay; norms and biases without, as the usual trainers of these models do."""
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def flops_per_sample(self, model: nn.Module) -> float:
        """Operations really needed: products of the blocks, attention, and the head at its positions."""
        config = model.config
        matrices = sum(p.numel() for block in model.blocks for p in block.parameters() if p.dim() == 2)
        width, length = config.hidden_size, self.length
        masked = length if self.objective.is_causal else 0.5 * length
        attention = 4 * length**2 * width * len(model.blocks)
        return 3.0 * (2 * matrices * length + attention + 2 * width * model.vocab_size * masked)

    def samples_to_tokens(self) -> int:
        return self.length
