"""Golden cases of the p-diff baselines and of the learning rates; see ``golden_adapter``."""

from collections.abc import Mapping

import torch
from torch import Tensor

from common.config import OptimConfig
from common.optim import learning_rate
from common.testing.golden import fill
from rpg.denoiser import ConvDenoiser
from rpg.vae import ParameterVAE, VAEConfig

Arrays = Mapping[str, Tensor]


def _denoiser(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    network = ConvDenoiser(
        config["layer_channels"], config["model_dim"], None, kernel_size=config["kernel_size"], mode="add"
    )
    fill(network, case["weights"]["seed"], skip=("time_embedder.freqs",))
    evaluated = network.eval()(x["in_x"], x["in_t"])
    return {"out_eval": evaluated, "out_train": network.train()(x["in_x"], x["in_t"])}


def _vae(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    def build(use_variance: bool) -> ParameterVAE:
        options = VAEConfig(
            channels=tuple(config["channels"]),
            d_latent=config["d_latent"],
            kernel_size=config["kernel_size"],
            divide=config["divide_slice_length"],
            use_variance=use_variance,
        )
        return fill(ParameterVAE(config["sequence_length"], options), case["weights"]["seed"]).eval()

    network = build(False)
    assert network.last_length == config["last_length"]
    mean_BZ, log_variance_BZ = network.encode(x["in_x"])
    return {
        "out_mu": mean_BZ,
        "out_log_var": log_variance_BZ,
        "out_reconstruction": network.decode(mean_BZ),
        "out_loss_no_var": network(x["in_x"]).total,
        "out_loss_use_var": build(True)(x["in_x"], eps_BZ=x["in_eps"]).total,
    }


def _learning_rates(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    lagged = OptimConfig(lr=config["base_lr"], warmup=0, schedule="cosine_lagged")
    warmed = OptimConfig(
        lr=config["base_lr"],
        warmup=config["warm_up_steps"],
        warmup_factor=config["warmup_factor"],
        schedule="cosine_lagged",
    )
    steps = range(1, config["iterations"] + 1)
    # the case lists the warmed rates by epoch; iteration 0 repeats the first, iteration i + 1 uses that of epoch i
    return {
        "out_cosine_lr": torch.tensor([learning_rate(step, lagged, config["total_steps"]) for step in steps]),
        "out_warmup_cosine_by_epoch": torch.tensor(
            [learning_rate(step + 1, warmed, config["total_steps"]) for step in steps]
        ),
    }


KINDS: list = [
    (lambda case, config, x: "warmup_factor" in config, _learning_rates),
    (lambda case, config, x: "divide_slice_length" in config, _vae),
    (lambda case, config, x: {"in_x", "in_t"} == x.keys() and "condition_dim" not in config
     and "layer_channels" in config, _denoiser),
]  # fmt: skip
