"""Gaussian diffusion in discrete time: tables, corruption, the reverse step's moments and the training losses.

Pure of networks: the caller runs the model at ``model_time(t)`` and hands its output in. Steps t are those of this
(possibly respaced) process; ``timestep_map`` holds the original step of each, which is what a network is given.
Wherever a step is taken, a tensor ``(B,)`` or one int for all rows will do; with an int the coefficients are plain
floats, so that a sampling loop launches few kernels and never waits for the device.

Dimensions: B rows, C channels, ``...`` the rest of a sample; T steps.

Source: Ho et al. (2020), Nichol and Dhariwal (2021); ``mup_dit`` specification 4.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import require_choice
from common.diffusion.betas import build_betas, respaced_betas, space_timesteps
from common.diffusion.gaussian_likelihood import (
    NATS_PER_BIT,
    discretized_gaussian_log_likelihood,
    gaussian_kl,
    row_mean,
)
from common.errors import ConfigError

PREDICTIONS = ("eps", "x0", "previous_x", "v")
VARIANCES = ("learned_range", "learned", "fixed_small", "fixed_large")
LOSSES = ("mse", "rescaled_mse", "kl", "rescaled_kl", "snr")
SNR_STEP = 249  # loss=snr: up to this step (of the model's time) x0 is compared, after it the noise
TINY_VARIANCE = 1e-20

Step = int | Tensor


@dataclass(frozen=True)
class Moments:
    """Mean, variance and log-variance of p(x_{t-1} | x_t), and the x0 behind them."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x0: Tensor


class GaussianDiffusion:
    """A diffusion process and what a network predicts of it.

    Attributes:
        num_steps: T.
        timestep_map: the original step of each.
        original_steps: of the process before respacing.
        betas, alphas_cumprod, ...: float64 tables ``(T,)``.
    """

    def __init__(
        self,
        betas_T: Tensor,
        *,
        timestep_map: Sequence[int] | None = None,
        original_steps: int | None = None,
        predict: str = "eps",
        variance: str = "learned_range",
        loss: str = "mse",
        min_snr_gamma: float | None = None,
    ) -> None:
        require_choice("predict", predict, PREDICTIONS)
        require_choice("variance", variance, VARIANCES)
        require_choice("loss", loss, LOSSES)
        if min_snr_gamma is not None and (loss not in ("mse", "rescaled_mse") or predict == "previous_x"):
            raise ConfigError(
                f"min_snr_gamma={min_snr_gamma} weighs squared errors of eps, x0 or v; it does not go with "
                f"loss={loss}, predict={predict}."
            )
        if min_snr_gamma is not None and min_snr_gamma <= 0:
            raise ConfigError(f"min_snr_gamma={min_snr_gamma} is not above 0; 5 is customary.")
        self.predict, self.variance, self.loss, self.min_snr_gamma = predict, variance, loss, min_snr_gamma
        self.num_steps = len(betas_T)
        self.timestep_map = list(timestep_map) if timestep_map is not None else list(range(self.num_steps))
        self.original_steps = original_steps or self.num_steps
        self._set_tables(betas_T.double())
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def _set_tables(self, betas: Tensor) -> None:
        """Specification 4.2; entry 0 of the posterior's log-variance, minus infinity, is replaced by entry 1."""
        alphas = 1.0 - betas
        abar = torch.cumprod(alphas, 0)
        previous = torch.cat([abar.new_ones(1), abar[:-1]])
        self.betas, self.alphas_cumprod, self.alphas_cumprod_prev = betas, abar, previous
        self.alphas_cumprod_next = torch.cat([abar[1:], abar.new_zeros(1)])
        self.sqrt_alphas_cumprod = abar.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1.0 - abar).sqrt()
        self.sqrt_recip_alphas_cumprod = abar.rsqrt()
        self.sqrt_recipm1_alphas_cumprod = (1.0 / abar - 1.0).sqrt()
        self.log_one_minus_alphas_cumprod = (1.0 - abar).log()
        self.log_betas = betas.log()
        self.posterior_variance = betas * (1.0 - previous) / (1.0 - abar)
        clipped = torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]])
        if self.num_steps == 1:  # no entry 1; the only step draws no noise
            clipped = self.posterior_variance.clamp(min=TINY_VARIANCE)
        self.posterior_log_variance_clipped = clipped.log()
        self.posterior_mean_coef1 = betas * previous.sqrt() / (1.0 - abar)
        self.posterior_mean_coef2 = (1.0 - previous) * alphas.sqrt() / (1.0 - abar)
        self.large_variance = torch.cat([clipped[:1], betas[1:]])
        self.large_log_variance = self.large_variance.log()
        self.snr = abar / (1.0 - abar)
        self._model_times = torch.tensor(self.timestep_map)
        # as lists: what a sampling loop reads by int
        self._floats = {name: table.tolist() for name, table in vars(self).items() if isinstance(table, Tensor)}

    @property
    def learns_variance(self) -> bool:
        """Whether a network gives as many channels again for the variance."""
        return self.variance.startswith("learned")

    def at(self, table: str, t: Step, like: Tensor) -> float | Tensor:
        """Entries of a table: a float for an int t, else float32 ``(B, 1, ...)`` to be broadcast over ``like``."""
        if isinstance(t, int):
            return self._floats[table][t]
        return self._table(table, t.device)[t].float().reshape(-1, *[1] * (like.ndim - 1))

    def _table(self, name: str, device: torch.device) -> Tensor:
        key = (name, device)
        if key not in self._on_device:
            self._on_device[key] = getattr(self, name).to(device)
        return self._on_device[key]

    def model_time(self, t: Step) -> Step:
        """The original steps, which the network is given."""
        return self.timestep_map[t] if isinstance(t, int) else self._table("_model_times", t.device)[t]

    # ------------------------------------------------------------------------------------------- forward process

    def q_sample(self, x0: Tensor, t: Step, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise."""
        scale, sigma = self.at("sqrt_alphas_cumprod", t, x0), self.at("sqrt_one_minus_alphas_cumprod", t, x0)
        return scale * x0 + sigma * noise

    def q_posterior_mean(self, x0: Tensor, x_t: Tensor, t: Step) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x0)."""
        return self.at("posterior_mean_coef1", t, x_t) * x0 + self.at("posterior_mean_coef2", t, x_t) * x_t

    def x0_from_eps(self, x_t: Tensor, t: Step, eps: Tensor) -> Tensor:
        recip, recipm1 = (self.at(f"sqrt_{name}_alphas_cumprod", t, x_t) for name in ("recip", "recipm1"))
        return recip * x_t - recipm1 * eps

    def eps_from_x0(self, x_t: Tensor, t: Step, x0: Tensor) -> Tensor:
        recip, recipm1 = (self.at(f"sqrt_{name}_alphas_cumprod", t, x_t) for name in ("recip", "recipm1"))
        return (recip * x_t - x0) / recipm1

    def velocity(self, x0: Tensor, t: Step, noise: Tensor) -> Tensor:
        """v = sqrt(abar) noise - sqrt(1 - abar) x0 (Salimans and Ho, 2022)."""
        scale, sigma = self.at("sqrt_alphas_cumprod", t, x0), self.at("sqrt_one_minus_alphas_cumprod", t, x0)
        return scale * noise - sigma * x0

    # ------------------------------------------------------------------------------------------- reverse process

    def split(self, output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        """A network's output as prediction and variance values (None if the variance is fixed).

        Raises: ValueError for a wrong number of channels.
        """
        expected = 2 * channels if self.learns_variance else channels
        if output.shape[1] == 2 * channels and not self.learns_variance:
            output = output[:, :channels]  # a network with variance channels, used with a fixed variance
        elif output.shape[1] != expected:
            raise ValueError(
                f"the model's output has {output.shape[1]} channels; variance={self.variance} of a sample "
                f"with {channels} needs {expected} (model.learn_sigma={str(self.learns_variance).lower()})."
            )
        return (output[:, :channels], output[:, channels:]) if self.learns_variance else (output, None)

    def x0_of(self, prediction: Tensor, x_t: Tensor, t: Step) -> Tensor:
        """The x0 that a prediction (of whatever kind) stands for."""
        if self.predict == "x0":
            return prediction
        if self.predict == "eps":
            return self.x0_from_eps(x_t, t, prediction)
        if self.predict == "v":
            scale, sigma = self.at("sqrt_alphas_cumprod", t, x_t), self.at("sqrt_one_minus_alphas_cumprod", t, x_t)
            return scale * x_t - sigma * prediction
        coef1, coef2 = self.at("posterior_mean_coef1", t, x_t), self.at("posterior_mean_coef2", t, x_t)
        return (prediction - coef2 * x_t) / coef1

    def log_variance_of(self, values: Tensor | None, t: Step, like: Tensor) -> float | Tensor:
        """log sigma_t^2: learnt values in [-1, 1] interpolate between the posterior's and beta's logarithm."""
        if self.variance == "learned":
            return values
        if self.variance == "learned_range":
            low, high = self.at("posterior_log_variance_clipped", t, like), self.at("log_betas", t, like)
            share = (values + 1.0) / 2.0
            return share * high + (1.0 - share) * low
        name = "large_log_variance" if self.variance == "fixed_large" else "posterior_log_variance_clipped"
        return self.at(name, t, like)

    def p_mean_variance(self, output: Tensor, x_t: Tensor, t: Step, *, clip_denoised: bool = False) -> Moments:
        """Moments of the reverse step for a network's output.

        Args:
            clip_denoised: whether x0 is clipped to [-1, 1], which suits pixels.
        """
        prediction, values = self.split(output, x_t.shape[1])
        x0 = self.x0_of(prediction, x_t, t)
        if clip_denoised:
            x0 = x0.clamp(-1.0, 1.0)
        mean = prediction if self.predict == "previous_x" else self.q_posterior_mean(x0, x_t, t)
        log_variance = self.log_variance_of(values, t, x_t)
        if self.learns_variance:
            return Moments(mean, log_variance.exp(), log_variance, x0)
        # fixed_small has variance 0 at t = 0, but a finite logarithm
        name = "large_variance" if self.variance == "fixed_large" else "posterior_variance"
        variance, log_variance = (
            torch.as_tensor(value, dtype=x_t.dtype, device=x_t.device).expand_as(x_t)
            for value in (self.at(name, t, x_t), log_variance)
        )
        return Moments(mean, variance, log_variance, x0)

    # ------------------------------------------------------------------------------------------- losses

    def training_losses(self, output: Tensor, x0: Tensor, x_t: Tensor, t_B: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Terms of the loss, ``(B,)`` each: ``loss``; ``mse`` except for kl; ``vb`` (bits) for kl or a learnt variance.

        ``vb`` trains the variance only: the prediction enters it detached. Means are over all axes but the batch.
        """
        if self.loss.endswith("kl"):
            bits = self.variational_bound(output, x0, x_t, t_B)
            return {"loss": bits * self.num_steps if self.loss == "rescaled_kl" else bits, "vb": bits}
        prediction, values = self.split(output, x0.shape[1])
        terms: dict[str, Tensor] = {}
        if values is not None:
            frozen = torch.cat([prediction.detach(), values], dim=1)
            terms["vb"] = self.variational_bound(frozen, x0, x_t, t_B)
            if self.loss == "rescaled_mse":
                terms["vb"] = terms["vb"] * (self.num_steps / 1000.0)
        terms["mse"] = self._squared_error(prediction, x0, x_t, t_B, noise)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def _squared_error(self, prediction: Tensor, x0: Tensor, x_t: Tensor, t_B: Tensor, noise: Tensor) -> Tensor:
        if self.loss == "snr":
            late = (self.model_time(t_B) > SNR_STEP).reshape(-1, *[1] * (x0.ndim - 1))
            found_x0 = self.x0_of(prediction, x_t, t_B)
            eps = prediction if self.predict == "eps" else self.eps_from_x0(x_t, t_B, found_x0)
            return row_mean((torch.where(late, noise, x0) - torch.where(late, eps, found_x0)) ** 2)
        error_B = row_mean((self.target(x0, x_t, t_B, noise) - prediction) ** 2)
        if self.min_snr_gamma is None:
            return error_B
        snr_B = self.at("snr", t_B, error_B)
        weight_B = snr_B.clamp(max=self.min_snr_gamma)  # of x0's error (Hang et al., 2023)
        return error_B * weight_B / {"eps": snr_B, "x0": 1.0, "v": snr_B + 1.0}[self.predict]

    def target(self, x0: Tensor, x_t: Tensor, t: Step, noise: Tensor) -> Tensor:
        """What the network should predict."""
        if self.predict == "eps":
            return noise
        if self.predict == "x0":
            return x0
        return self.velocity(x0, t, noise) if self.predict == "v" else self.q_posterior_mean(x0, x_t, t)

    def variational_bound(
        self, output: Tensor, x0: Tensor, x_t: Tensor, t_B: Tensor, *, clip_denoised: bool = False
    ) -> Tensor:
        """One term of the bound in bits per element, ``(B,)``: KL(q(x_{t-1} | x_t, x0) || p); decoder's at t = 0."""
        moments = self.p_mean_variance(output, x_t, t_B, clip_denoised=clip_denoised)
        true_mean = self.q_posterior_mean(x0, x_t, t_B)
        true_log_variance = self.at("posterior_log_variance_clipped", t_B, x_t)
        kl_B = row_mean(gaussian_kl(true_mean, true_log_variance, moments.mean, moments.log_variance))
        decoder_B = -row_mean(discretized_gaussian_log_likelihood(x0, moments.mean, 0.5 * moments.log_variance))
        return torch.where(t_B == 0, decoder_B, kl_B) / NATS_PER_BIT

    def prior_bits(self, x0: Tensor) -> Tensor:
        """KL(q(x_{T-1} | x0) || N(0, I)) in bits per element, ``(B,)``: the bound's term that no training changes."""
        last = self.num_steps - 1
        mean = self.at("sqrt_alphas_cumprod", last, x0) * x0
        log_variance = torch.full_like(x0, self.at("log_one_minus_alphas_cumprod", last, x0))
        return row_mean(gaussian_kl(mean, log_variance, torch.zeros_like(x0), torch.zeros_like(x0))) / NATS_PER_BIT


def build_diffusion(
    steps: int = 1000,
    schedule: str = "linear",
    respacing: str | Sequence[int] = "",
    predict: str = "eps",
    variance: str = "learned_range",
    loss: str = "mse",
    *,
    min_snr_gamma: float | None = None,
) -> GaussianDiffusion:
    """A process by names.

    Args:
        steps: of the original process.
        schedule: of its betas (``betas.SCHEDULES``).
        respacing: of the steps that are kept (``betas.space_timesteps``).
        predict, variance, loss: see ``PREDICTIONS``, ``VARIANCES``, ``LOSSES``.
        min_snr_gamma: weights squared errors by min(SNR, gamma), in units of x0's error; None: all alike.

    Raises: ConfigError for values that do not exist or do not go together.
    """
    betas = build_betas(schedule, steps)
    kept = space_timesteps(steps, respacing)
    if len(kept) < steps:
        betas = respaced_betas(betas, kept)
    return GaussianDiffusion(
        betas,
        timestep_map=kept,
        original_steps=steps,
        predict=predict,
        variance=variance,
        loss=loss,
        min_snr_gamma=min_snr_gamma,
    )
