"""What a training step of a diffusion transformer computes: noised latents, one network call, a mean square per image.

Batches hold ``image`` (B, C, S, S) in [-1, 1] or, of cached latents, ``mean`` and ``std``; and the condition: ``label``
(B,), or ``caption`` (B, 1, T, Y) with ``mask`` (B, T), and ``pooled`` (B, P) for MMDiT.

Dimensions: B batch, C channels, S side of the latent.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.diffusion.gaussian import GaussianDiffusion, build_diffusion
from common.errors import ConfigError, DataError
from common.seeding import generator
from common.task import Batch, Draws, StepOutput, Task
from mup_dit.building import ModelConfig, Network, build_model
from mup_dit.objective import ObjectiveConfig
from mup_dit.optimizer_groups import mup_groups


class LatentEncoder(Protocol):
    """Images in [-1, 1] -> posterior mean and standard deviation of the latent, each ``(B, C, S, S)``, unscaled."""

    scale: float
    device: torch.device

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]: ...

    def to(self, device: torch.device) -> "LatentEncoder": ...


class FeatureEncoder(Protocol):
    """Images -> ``(B, N, F)``: one feature per image token, of a frozen network (REPA)."""

    def __call__(self, image: Tensor) -> Tensor: ...


def build_objective(objective: ObjectiveConfig, learn_sigma: bool) -> GaussianDiffusion:
    """The diffusion of ``objective``; kind ``ddpm``."""
    return build_diffusion(
        steps=objective.steps,
        schedule=objective.schedule,
        predict=objective.predict,
        variance=objective.variance_of(learn_sigma),
        loss=objective.loss,
        min_snr_gamma=objective.min_snr_gamma,
    )


class DiffusionTask(Task):
    """Training of DiT, PixArt-alpha or MMDiT.

    Args:
        model: network and parametrisation.
        seed: of times, noise, dropped conditions and posterior samples.
        latent_scale: factor on cached latents (0.18215 for Stable Diffusion's VAE); encoders bring their own.
        encoder: encodes images while training; None: images are the latents, or latents are cached.
        features: frozen network of the REPA loss.
        decay_rule: see ``mup_groups``.
        scale_eps: Adam's eps divided by m for matrices; the number is the base eps. None: one eps for all.
        build: makes the network; None: ``build_model(model)``. The engine has seeded torch's generator for it.
    """

    def __init__(
        self,
        model: ModelConfig,
        objective: ObjectiveConfig,
        *,
        seed: int,
        latent_scale: float = 1.0,
        encoder: LatentEncoder | None = None,
        features: FeatureEncoder | None = None,
        decay_rule: str = "scaled",
        scale_eps: float | None = None,
        build: Callable[[], Network] | None = None,
    ) -> None:
        self.model, self.objective, self.seed = model, objective, seed
        self.latent_scale, self.encoder, self.features = latent_scale, encoder, features
        self.decay_rule, self.scale_eps = decay_rule, scale_eps
        self.build = build or (lambda: build_model(model))
        if (objective.kind == "flow") != (model.family == "mmdit"):
            raise ConfigError(
                f"objective.kind={objective.kind} does not fit model.family={model.family}: mmdit is trained by flow, "
                "dit and pixart by ddpm."
            )
        if (features is not None) != (getattr(model.network, "repa_depth", None) is not None):
            raise ConfigError("model.repa_depth and data.repa_encoder belong together; give both or neither.")
        self.diffusion = None if objective.kind == "flow" else build_objective(objective, model.network.learn_sigma)

    def build_model(self) -> nn.Module:
        return self.build()

    # ---------------------------------------------------------------- random numbers

    def draw(self, step: int, size: int) -> dict[str, Tensor]:
        rng = self._generators("", step)
        if self.diffusion is not None:
            times = torch.randint(self.diffusion.num_steps, (size,), generator=rng("time"))
        else:
            times = self._flow_times(torch.randn(size, generator=rng("time")), torch.rand(size, generator=rng("time")))
        drop_B = torch.rand(size, generator=rng("drop")) < self.model.network.class_dropout_prob
        return {"t": times, "drop": drop_B, **self._latent_draws(rng, size)}

    def validation_draw(self, index: int, size: int) -> dict[str, Tensor]:
        """Fixed; times are stratified over the batch, and no condition is dropped."""
        rng = self._generators("validation ", index)
        place_B = (torch.randperm(size, generator=rng("order")) + torch.rand(size, generator=rng("time"))) / size
        if self.diffusion is not None:
            times = (place_B * self.diffusion.num_steps).long().clamp(max=self.diffusion.num_steps - 1)
        else:
            # the normal quantile of a stratified uniform variable
            times = self._flow_times(torch.special.ndtri(place_B.clamp(1e-6, 1 - 1e-6)), place_B)
        return {"t": times, "drop": torch.zeros(size, dtype=torch.bool), **self._latent_draws(rng, size)}

    def _generators(self, kind: str, step: int) -> Callable[[str], torch.Generator]:
        return lambda name: generator(self.seed, f"diffusion {kind}{name}", step)

    def _latent_draws(self, rng: Callable[[str], torch.Generator], size: int) -> dict[str, Tensor]:
        network = self.model.network
        shape = (size, network.in_channels, network.input_size, network.input_size)
        return {
            "noise": torch.randn(shape, generator=rng("noise")),
            "posterior": torch.randn(shape, generator=rng("posterior")),
        }

    def _flow_times(self, normal_B: Tensor, uniform_B: Tensor) -> Tensor:
        if self.objective.time_sampler == "uniform":
            return uniform_B
        return torch.sigmoid(self.objective.time_mean + self.objective.time_std * normal_B)

    # ---------------------------------------------------------------- steps

    def count(self, batch: Batch, draws: Draws) -> float:
        """Images."""
        return float(len(draws["t"]))

    def training_step(self, model: nn.Module, batch: Batch, draws: Draws) -> StepOutput:
        x0, eps, t = self.latents(batch, draws), draws["noise"], draws["t"]
        condition = self.condition(batch, draws["drop"] if model.training else None)
        if self.diffusion is None:
            return self._flow_step(model, batch, x0, eps, t, condition)
        x_t = self.diffusion.q_sample(x0, t, eps)
        out = model(x_t, self.diffusion.model_time(t), **condition)
        terms = self.diffusion.training_losses(out.float(), x0, x_t, t, eps)
        size = float(len(t))
        metrics = {name: (value.detach().sum(), size) for name, value in terms.items() if name != "loss"}
        return StepOutput(loss_sum=terms["loss"].sum(), metrics=metrics)

    def _flow_step(
        self, model: nn.Module, batch: Batch, x0: Tensor, eps: Tensor, t_B: Tensor, condition: dict[str, Tensor]
    ) -> StepOutput:
        """``x_t = (1 - t) x0 + t eps``, target ``eps - x0``; with REPA minus the cosine to the encoder's features."""
        t = t_B[:, None, None, None]
        x_t, size = (1 - t) * x0 + t * eps, float(len(t_B))
        if self.features is None:
            velocity, found_BNF = model(x_t, t_B, **condition), None
        else:
            velocity, found_BNF = model(x_t, t_B, **condition, features=True)
        mse_B = (velocity.float() - (eps - x0)).square().flatten(1).mean(dim=1)
        metrics = {"mse": (mse_B.detach().sum(), size)}
        loss_B = mse_B
        if found_BNF is not None:
            with torch.no_grad():
                wanted_BNF = self.features(batch["image"])
            repa_B = 1 - F.cosine_similarity(found_BNF.float(), wanted_BNF.float(), dim=-1).mean(dim=1)
            loss_B = loss_B + self.objective.repa_weight * repa_B
            metrics["repa"] = (repa_B.detach().sum(), size)
        return StepOutput(loss_sum=loss_B.sum(), metrics=metrics)

    def latents(self, batch: Batch, draws: Draws) -> Tensor:
        """float32 ``(B, C, S, S)``: what is noised. A posterior is sampled with the step's own draws.

        Raises: DataError if the batch holds neither images nor latents, or latents of another size.
        """
        if "mean" in batch:
            x0 = (batch["mean"].float() + batch["std"].float() * draws["posterior"]) * self.latent_scale
        elif "image" not in batch:
            raise DataError(f"batches hold {sorted(batch)}, but neither image nor mean and std.")
        elif self.encoder is None:
            x0 = batch["image"].float()
        else:
            if self.encoder.device != batch["image"].device:  # the engine moves the network only
                self.encoder.to(batch["image"].device)
            with torch.no_grad():
                mean, std = self.encoder.encode(batch["image"])
            x0 = (mean.float() + std.float() * draws["posterior"]) * self.encoder.scale
        if x0.shape != draws["noise"].shape:
            raise DataError(
                f"latents have shape {tuple(x0.shape[1:])}, but the network takes {tuple(draws['noise'].shape[1:])}; "
                "set model.input_size and model.in_channels to those of the data."
            )
        return x0

    def condition(self, batch: Batch, drop_B: Tensor | None) -> dict[str, Tensor]:
        """Keyword arguments of the network.

        Raises: DataError if the batch lacks what this kind of network is conditioned on.
        """
        wanted = {"dit": ("label",), "pixart": ("caption",), "mmdit": ("caption", "pooled")}[self.model.family]
        for name in wanted:
            if name not in batch:
                raise DataError(
                    f"model.family={self.model.family} is conditioned on {name}, which the data lack; they hold "
                    f"{sorted(batch)}. Choose data with {'labels' if name == 'label' else 'caption features'}."
                )
        if self.model.family == "dit":
            # without a null class nothing is dropped
            has_null = self.model.network.class_dropout_prob > 0
            return {"y_B": batch["label"], "drop_B": drop_B if has_null else None}
        if self.model.family == "pixart":
            extra = {}
            if self.model.network.micro_conditions:
                extra = {"img_hw_B2": batch["img_hw"], "aspect_ratio_B1": batch["aspect_ratio"]}
            return {"y_B1TY": batch["caption"], "mask": batch.get("mask"), "drop_B": drop_B, **extra}
        return {
            "text_BTC": batch["caption"].squeeze(1),
            "pooled_BP": batch["pooled"],
            "mask_BT": batch.get("mask"),
            "drop_B": drop_B,
        }

    # ---------------------------------------------------------------- what the engine optimises and reports

    def param_groups(self, model: nn.Module, weight_decay: float) -> list[dict]:
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        scalings = getattr(model, "scalings", None)
        groups = mup_groups(trainable, scalings, weight_decay, decay_rule=self.decay_rule, eps=self.scale_eps)
        return [{key: value for key, value in group.items() if key != "names"} for group in groups if group["params"]]

    def flops_per_sample(self, model: nn.Module) -> float:
        """Products of the blocks' linear maps and attention, forward and backward; modulations act once per image."""
        network = self.model.network
        tokens = network.grid**2
        per_token = per_image = 0
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and parameter.requires_grad and "table" not in name:
                if any(part in name for part in ("adaLN", "norm1", "norm_out", "embed", "t_block")):
                    per_image += parameter.numel()
                else:
                    per_token += parameter.numel()
        attention = 4 * tokens**2 * network.hidden_size * network.depth
        return 3.0 * (2 * per_token * tokens + 2 * per_image + attention)

    def samples_to_tokens(self) -> int:
        return self.model.network.grid**2
