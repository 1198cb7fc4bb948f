"""Golden cases of diffusion; see ``golden_adapter``."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from common.diffusion.betas import space_timesteps
from common.diffusion.gaussian import GaussianDiffusion, build_diffusion
from mup_dit.guidance import Guidance, GuidedDenoiser
from mup_dit.image_files import to_uint8
from mup_dit.samplers.ddim import sample_ddim
from mup_dit.samplers.ddpm import sample_ddpm
from mup_dit.samplers.dpm_solver import sample_dpm_solver
from mup_dit.samplers.sa_solver import middle_noise, sample_sa_solver
from mup_dit.samplers.vp_schedule import VPSchedule

Arrays = Mapping[str, Tensor]
TABLES = (
    "betas", "alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1",
    "posterior_mean_coef2",
)  # fmt: skip


def _tables(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    outputs: dict[str, object] = {}
    for spec in config["specs"]:
        diffusion = build_diffusion(spec["diffusion_steps"], spec["noise_schedule"], spec["timestep_respacing"])
        prefix = f"out{spec['index']}"
        outputs[f"{prefix}_timestep_map"] = diffusion.timestep_map
        outputs |= {f"{prefix}_{name}_f64": getattr(diffusion, name) for name in TABLES}
    return outputs


def _spacing(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    """The case holds its results among its options."""
    kept = [space_timesteps(entry["num_timesteps"], entry["section_counts"]) for entry in config["cases"]]
    return {"config": {"cases": [{"kept": steps, "count": len(steps)} for steps in kept]}}


def _diffusion(config: Mapping) -> GaussianDiffusion:
    return build_diffusion(
        respacing=config.get("timestep_respacing", ""),
        variance="learned_range" if config.get("learn_sigma", True) else "fixed_large",
        loss="snr" if config.get("snr") else "rescaled_mse" if config.get("rescale_learned_sigmas") else "mse",
    )


def _losses(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    diffusion = _diffusion(config)
    x0, t, output = x["in_x_start"], x["in_t"], x["in_model_output"]
    x_t = diffusion.q_sample(x0, t, x["in_noise"])
    terms = diffusion.training_losses(output, x0, x_t, t, x["in_noise"])
    moments = diffusion.p_mean_variance(output, x_t, t, clip_denoised=True)
    return {
        "out_x_t": x_t,
        "out_model_t": diffusion.model_time(t),
        **{f"out_{name}": values for name, values in terms.items()},
        "out_pmv_mean": moments.mean,
        "out_pmv_variance": moments.variance,
        "out_pmv_log_variance": moments.log_variance,
        "out_pmv_pred_xstart": moments.x0,
    }


def _ancestral(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    """DDPM and DDIM; under guidance the rows are doubled, as the reference's loop has them."""
    from tests.mup_dit.golden_adapter import build

    model = build(case, config)
    scale = config.get("cfg_scale")

    def denoise(x_BCSS: Tensor, time: float) -> Tensor:
        t_B = torch.full((len(x_BCSS),), time)
        if scale is None:
            return model(x_BCSS, t_B, x["in_y"])
        return model.forward_with_cfg(x_BCSS, t_B, x["in_y"], scale)

    diffusion = _diffusion(config)
    draw = iter(x["in_noise"]).__next__
    clip = config.get("clip_denoised", False)
    eta = config.get("eta", re.search(r"eta=([\d.]+)", case.get("what", "")))
    if config["timestep_respacing"].startswith("ddim") or eta is not None:
        eta = float(eta[1]) if isinstance(eta, re.Match) else float(eta or 0.0)
        return {"out": sample_ddim(denoise, x["in_z"], diffusion, draw, eta=eta, clip_denoised=clip)}
    return {"out": sample_ddpm(denoise, x["in_z"], diffusion, draw, clip_denoised=clip)}


class _AnalyticNetwork(torch.nn.Module):
    """The formula of the cases of solvers; notes the times it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def forward(self, x: Tensor, t_B: Tensor, y: Tensor) -> Tensor:
        self.times.append(float(t_B[0]))
        strength = (0.5 + 0.5 * torch.tanh(t_B / 300 - 1)).reshape(-1, 1, 1, 1)
        level = y.flatten(1).mean(1).reshape(-1, 1, 1, 1)
        return strength * 0.9 * x + 0.1 * torch.sin(3 * x + level)


def _solver(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    network = _AnalyticNetwork()
    guidance = Guidance(scale=config["cfg_scale"], channels="all")
    denoise = GuidedDenoiser(network, {"y": x["in_cond"]}, {"y": x["in_uncond"]}, guidance, last_time=999.0)
    schedule = VPSchedule(build_diffusion())
    if "S" in config:
        draw = iter(x["in_noise"][1:]).__next__  # the reference makes one draw that it does not use
        out = sample_sa_solver(denoise, x["in_z"], schedule, config["S"], draw, tau=middle_noise(config["eta"]))
    else:
        out = sample_dpm_solver(
            denoise, x["in_z"], schedule, config["steps"], order=config["order"], grid=config["skip_type"]
        )
    return {"out": out, "out_model_t": torch.tensor(network.times), "nfe": len(network.times)}


def _pixels(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    return {"out_dit": to_uint8(x["in_x"]), "out_save_image": to_uint8(x["in_x"], rounding="nearest")}


KINDS: list = [
    (lambda case, config, x: "specs" in config, _tables),
    (lambda case, config, x: "section_counts" in (config.get("cases") or [{}])[0], _spacing),
    (lambda case, config, x: {"in_x_start", "in_model_output"} <= x.keys(), _losses),
    (lambda case, config, x: {"in_z", "in_noise", "in_y"} <= x.keys(), _ancestral),
    (lambda case, config, x: {"in_z", "in_cond", "in_uncond"} <= x.keys(), _solver),
    (lambda case, config, x: "out_save_image" in case.get("arrays", ()), _pixels),
]
