"""From conditions to latents: which sampler with which schedule, and one stream of random numbers per sample.

Dimensions: B rows, C channels, S side of the latent, T text tokens, Y their channels, P channels of pooled text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from common.config import require_at_least, require_choice
from common.diffusion.gaussian import build_diffusion
from common.errors import ConfigError
from common.seeding import generator
from mup_dit.guidance import Guidance, GuidedDenoiser
from mup_dit.objective import ObjectiveConfig
from mup_dit.samplers.ddim import sample_ddim
from mup_dit.samplers.ddpm import sample_ddpm
from mup_dit.samplers.dpm_solver import ORDERS, sample_dpm_solver
from mup_dit.samplers.flow import sample_euler, sample_heun
from mup_dit.samplers.sa_solver import middle_noise, sample_sa_solver
from mup_dit.samplers.vp_schedule import GRIDS, VPSchedule

DEFAULT_STEPS = {"ddpm": 250, "ddim": 50, "dpm_solver": 20, "sa_solver": 25, "flow_euler": 28, "flow_heun": 14}
SAMPLERS = ("auto", *DEFAULT_STEPS)
AUTO = {"dit": "ddpm", "pixart": "dpm_solver", "mmdit": "flow_euler"}
CFG_CHANNELS = ("auto", "three", "all")

Condition = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Options of group ``sampling``."""

    sampler: Literal["auto", "ddpm", "ddim", "dpm_solver", "sa_solver", "flow_euler", "flow_heun"] = "auto"
    steps: int | None = None  # null: 250 ddpm, 50 ddim, 20 dpm_solver, 25 sa_solver, 28 flow_euler, 14 flow_heun
    respacing: str | None = None  # ddpm, ddim: which steps, e.g. "10,15,20" or "ddim50"; null: by steps
    eta: float | None = None  # ddim: share of noise (null: 0); sa_solver: noise in the middle (null: 1)
    order: int = 2  # dpm_solver: 1, 2 or 3; sa_solver: of predictor and corrector
    grid: Literal["time_uniform", "time_quadratic", "logsnr"] = "time_uniform"  # dpm_solver, sa_solver
    shift: float = 1.0  # flow: above 1 more steps at high noise
    clip_denoised: bool = False  # ddpm, ddim: clip predicted images to [-1, 1]; for pixels
    cfg_scale: float = 1.0  # classifier-free guidance; 1: none
    cfg_channels: Literal["auto", "three", "all"] = "auto"  # auto: three for ddpm and ddim, as the reference, else all
    cfg_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])  # where guidance acts; 0 data, 1 noise

    def __post_init__(self) -> None:
        for name, choices in (
            ("sampler", SAMPLERS), ("order", ORDERS), ("grid", GRIDS), ("cfg_channels", CFG_CHANNELS),
        ):  # fmt: skip
            require_choice(f"sampling.{name}", getattr(self, name), choices)
        if self.steps is not None:
            require_at_least("sampling.steps", self.steps, 1)
        if self.eta is not None:
            require_at_least("sampling.eta", self.eta, 0)
        if len(self.cfg_interval) != 2:
            raise ConfigError(f"sampling.cfg_interval={self.cfg_interval} must be two numbers, for example [0.2, 0.8].")
        self.guidance("ddpm")

    def resolve(self, family: str) -> str:
        """The sampler's name for a family of networks.

        Raises: ConfigError for a diffusion's sampler of a flow, or the reverse.
        """
        name = AUTO[family] if self.sampler == "auto" else self.sampler
        if name.startswith("flow") != (family == "mmdit"):
            fitting = [other for other in DEFAULT_STEPS if other.startswith("flow") == (family == "mmdit")]
            raise ConfigError(f"sampling.sampler={name} does not fit model.family={family}; use {', '.join(fitting)}.")
        if self.respacing is not None and name not in ("ddpm", "ddim"):
            raise ConfigError(f"sampling.respacing={self.respacing} is for ddpm and ddim; {name} takes sampling.steps.")
        return name

    def guidance(self, sampler: str) -> Guidance:
        channels = self.cfg_channels
        if channels == "auto":
            channels = "three" if sampler in ("ddpm", "ddim") else "all"
        start, end = self.cfg_interval
        return Guidance(scale=self.cfg_scale, channels=channels, start=start, end=end)


class RowNoise:
    """Gaussian noise for the samples of a batch, each from its own generator.

    Sample i gets the same numbers in every batch and on every device: they are drawn on the CPU and copied without
    waiting.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, ...], device: torch.device) -> None:
        self._generators = [generator(seed, "sample", index) for index in indices]
        self._shape, self._device = shape, device

    def __call__(self) -> Tensor:
        """float32 ``(B, C, S, S)``, new at every call."""
        # a new page-locked block each time: a copy from the last one may still be under way
        noise = torch.empty(len(self._generators), *self._shape, pin_memory=self._device.type == "cuda")
        for row, rng in zip(noise, self._generators, strict=True):
            torch.randn(self._shape, generator=rng, out=row)
        return noise.to(self._device, non_blocking=True)


def label_condition(network: nn.Module, labels: Sequence[int], device: torch.device) -> tuple[Condition, Condition]:
    """What DiT is called with, and the null class in its place.

    Raises: ConfigError for labels outside the classes.
    """
    classes = network.config.num_classes
    # the null class is a label too: an unconditional sample
    last = classes if network.config.class_dropout_prob > 0 else classes - 1
    for label in labels:
        if not 0 <= label <= last:
            raise ConfigError(f"label {label} is none of the model's {classes} classes; use 0 to {last}.")
    y_B = torch.tensor(labels, device=device)
    return {"y_B": y_B}, ({"y_B": torch.full_like(y_B, classes)} if last == classes else {})


def caption_condition(
    network: nn.Module,
    family: str,
    caption_B1TY: Tensor,
    mask_BT: Tensor | None,
    pooled_BP: Tensor | None = None,
    *,
    pixels: tuple[int, int] | None = None,
) -> tuple[Condition, Condition]:
    """What PixArt-alpha or MMDiT is called with, and its null caption.

    The null caption has as many tokens as the caption in whose place it stands, as in the reference.

    Args:
        pixels: height and width of the images, which PixArt-alpha with ``micro_conditions`` is told.

    Raises: ConfigError if MMDiT gets no pooled text.
    """
    if family == "pixart":
        null = network.y_embedder.y_embedding[None, None].expand_as(caption_B1TY).to(caption_B1TY.dtype)
        condition = {"y_B1TY": caption_B1TY, **({} if mask_BT is None else {"mask": mask_BT})}
        if network.config.micro_conditions:
            size_B2 = caption_B1TY.new_tensor(pixels or (network.config.input_size,) * 2).expand(len(caption_B1TY), 2)
            condition |= {"img_hw_B2": size_B2, "aspect_ratio_B1": size_B2[:, :1] / size_B2[:, 1:]}
        return condition, {"y_B1TY": null}
    if pooled_BP is None:
        raise ConfigError("model.family=mmdit needs pooled text beside the tokens, which this text encoder lacks.")
    text_BTY = caption_B1TY.squeeze(1)
    condition = {"text_BTC": text_BTY, "pooled_BP": pooled_BP}
    null = {name: torch.zeros_like(values) for name, values in condition.items()}
    return {**condition, **({} if mask_BT is None else {"mask_BT": mask_BT})}, null


class LatentSampler:
    """Latents of a network by one sampler; tables are made once and serve all batches.

    Args:
        network: called as ``network(x, t_B, **condition)``.
        family: dit, pixart or mmdit.
        weak: a poorer network to guide away from.
        size: rows and columns of the latents, of a network that takes any; None: its own.

    Raises: ConfigError for a sampler, a grid or guidance that does not fit the network.
    """

    def __init__(
        self,
        network: nn.Module,
        family: str,
        objective: ObjectiveConfig,
        config: SamplerConfig,
        *,
        weak: nn.Module | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.network, self.family, self.config, self.weak = network, family, config, weak
        side = network.config.input_size
        self.shape = (network.config.in_channels, *(size or (side, side)))  # of a latent: channels, rows, columns
        self.sampler = config.resolve(family)
        self.guidance = config.guidance(self.sampler)
        self.steps = config.steps or DEFAULT_STEPS[self.sampler]
        self.evaluations = 0  # network rows per sample of the last batch
        self.last_time = 1.0 if family == "mmdit" else objective.steps - 1.0
        if self.sampler in ("ddpm", "ddim"):
            respacing = config.respacing
            if respacing is None and self.steps > objective.steps:
                raise ConfigError(
                    f"sampling.steps={self.steps} exceeds the {objective.steps} steps of the model's noise schedule; "
                    f"ask for 1 to {objective.steps}."
                )
            if respacing is None:
                respacing = f"ddim{self.steps}" if self.sampler == "ddim" else str(self.steps)
            self.diffusion = self._diffusion(objective, respacing)
            self.steps = self.diffusion.num_steps
        elif family != "mmdit":
            self.schedule = VPSchedule(self._diffusion(objective, ""))
            self.schedule.grid(self.steps, config.grid)  # an error now rather than behind the first batch

    def _diffusion(self, objective: ObjectiveConfig, respacing: str):
        return build_diffusion(
            objective.steps,
            objective.schedule,
            respacing,
            objective.predict,
            objective.variance_of(self.network.config.learn_sigma),
        )

    @torch.no_grad()
    def __call__(self, condition: Condition, null: Mapping[str, Tensor], noise: Callable[[], Tensor]) -> Tensor:
        """float32 ``(B, C, S, S)``: the first draw is the starting point, the others are the sampler's.

        Raises: ConfigError for guidance without a null condition.
        """
        if self.guidance.scale != 1.0 and not null and self.weak is None:
            raise ConfigError(
                f"sampling.cfg_scale={self.guidance.scale} needs a null class, but the model was trained with "
                "class_dropout_prob=0; use cfg_scale=1."
            )
        denoise = GuidedDenoiser(self.network, condition, null, self.guidance, last_time=self.last_time, weak=self.weak)
        latents = self._run(denoise, noise(), noise)
        self.evaluations = denoise.evaluations
        return latents

    def _run(self, denoise: GuidedDenoiser, x: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        config = self.config
        if self.sampler == "ddpm":
            return sample_ddpm(denoise, x, self.diffusion, noise, clip_denoised=config.clip_denoised)
        if self.sampler == "ddim":
            eta, clip = config.eta or 0.0, config.clip_denoised
            return sample_ddim(denoise, x, self.diffusion, noise, eta=eta, clip_denoised=clip)
        if self.sampler == "dpm_solver":
            return sample_dpm_solver(denoise, x, self.schedule, self.steps, order=config.order, grid=config.grid)
        if self.sampler == "sa_solver":
            tau = middle_noise(1.0 if config.eta is None else config.eta)
            orders = {"predictor_order": config.order, "corrector_order": config.order}
            return sample_sa_solver(denoise, x, self.schedule, self.steps, noise, tau=tau, grid=config.grid, **orders)
        integrate = sample_euler if self.sampler == "flow_euler" else sample_heun
        return integrate(denoise, x, self.steps, shift=config.shift)
