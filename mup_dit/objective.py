"""What a step minimises: denoising of a Gaussian diffusion, or the velocity of a rectified flow.

Source: specification 4.2 (diffusion), 3.6 (flow; Esser et al., 2024, for the logit-normal times).
"""

from dataclasses import dataclass
from typing import Literal

from common.config import require_at_least, require_choice
from common.diffusion.betas import ALIASES, SCHEDULES
from common.diffusion.gaussian import LOSSES, PREDICTIONS, VARIANCES
from common.errors import ConfigError

KINDS = ("ddpm", "flow")
FLOW_TIMES = ("logit_normal", "uniform")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Options of group ``objective``."""

    kind: Literal["ddpm", "flow"] = "ddpm"
    steps: int = 1000  # ddpm: T, steps of the noise schedule
    schedule: str = "linear"  # ddpm: of the noise
    predict: str = "eps"  # ddpm: what the network predicts
    variance: str | None = None  # ddpm; null: learned_range for a network with variance channels, else fixed_large
    loss: str = "mse"  # ddpm
    min_snr_gamma: float | None = None  # ddpm: squared errors weighted by min(SNR, gamma) (5)
    time_sampler: Literal["logit_normal", "uniform"] = "uniform"  # flow: law of t in [0, 1]
    time_mean: float = 0.0  # flow, logit_normal: of the normal variable
    time_std: float = 1.0
    repa_weight: float = 0.5  # flow with model.repa_depth: weight of the alignment loss

    def __post_init__(self) -> None:
        for name, choices in (
            ("kind", KINDS),
            ("schedule", (*SCHEDULES, *ALIASES)),
            ("predict", PREDICTIONS),
            ("loss", LOSSES),
            ("time_sampler", FLOW_TIMES),
        ):
            require_choice(f"objective.{name}", getattr(self, name), choices)
        if self.variance is not None:
            require_choice("objective.variance", self.variance, VARIANCES)
        require_at_least("objective.steps", self.steps, 1)
        require_at_least("objective.repa_weight", self.repa_weight, 0)
        if not self.time_std > 0:
            raise ConfigError(f"objective.time_std={self.time_std} must be positive.")

    def variance_of(self, learn_sigma: bool) -> str:
        """The rule for the variance of a network with or without variance channels.

        Raises: ConfigError if the two contradict each other.
        """
        if self.variance is None:
            return "learned_range" if learn_sigma else "fixed_large"
        if self.variance.startswith("learned") != learn_sigma:
            raise ConfigError(
                f"objective.variance={self.variance} does not fit model.learn_sigma={str(learn_sigma).lower()}; "
                "set model.learn_sigma accordingly, or objective.variance=null."
            )
        return self.variance
