"""Computes the golden cases of RPG; dispatches on what a case holds, never on its name."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from common.testing.golden import fill_listed
from rpg.denoiser import ConvDenoiser
from rpg.mamba2 import Mamba2Mixer, StepState
from rpg.model import Generator
from rpg.model_config import GeneratorConfig
from rpg.noise_schedule import TokenDiffusion, linear_tables
from rpg.positions import position_table_1d, position_table_2d
from rpg.recurrence import GatedMLPStack, LSTMStack, MambaStack, Stack, TransformerStack
from rpg.samplers import ddim, ddpm, trajectory
from rpg.ssd import ssd_scan, step_sizes

Arrays = Mapping[str, Tensor]
Outputs = dict[str, object]
MIXER_OPTIONS = ("d_state", "d_conv", "expand", "headdim", "ngroups", "chunk_size")


def run(name: str, case: Mapping, arrays: Mapping[str, np.ndarray]) -> Outputs:
    """The ``out_*`` arrays of a case, from its description and its ``in_*`` arrays.

    Raises: KeyError for a case of no known kind.
    """
    inputs = {key: torch.from_numpy(np.array(value)) for key, value in arrays.items() if key.startswith("in")}
    config = case.get("config") or {}
    for holds, compute in kinds():
        if holds(case, config, inputs):
            return compute(case, config, inputs)
    raise KeyError(f"{name}: no kind of case that is known")


def outputs_wanted(case: Mapping) -> list[str]:
    return [key for key in case.get("arrays", ()) if key.startswith("out")]


# ------------------------------------------------------------------------------------------- tables and recurrences


def _positions(case: Mapping, config: Mapping, x: Arrays) -> Outputs:
    return {
        "out_pe2d": position_table_2d(config["dim1"], config["dim2"], config["d_model"]),
        "out_pe1d": position_table_1d(config["length_1d"], config["d_model"]),
    }


def _schedule(case: Mapping, config: Mapping, x: Arrays) -> Outputs:
    tables = linear_tables(*config["beta"], config["T"])
    return {
        "out_beta_t": tables.beta_T,
        "out_signal_rate": tables.signal_rate_T,
        "out_noise_rate": tables.noise_rate_T,
        "out_coeff_1": tables.coeff_1_T,
        "out_coeff_2": tables.coeff_2_T,
        "out_posterior_variance": tables.posterior_variance_T,
        "out_alpha_t_bar": tables.abar_T,
    }


def _scan(case: Mapping, config: Mapping, x: Arrays) -> Outputs:
    a_BLH = step_sizes(x["in_dt"], x["in_dt_bias"])
    parts = (x["in_x"], a_BLH, x["in_A"], x["in_B"], x["in_C"], x["in_D"])
    chunk = config["chunk_size"]
    y, state = ssd_scan(*parts, chunk_size=chunk, initial_BHPN=x["in_initial_state"])
    y_zero, state_zero = ssd_scan(*parts, chunk_size=chunk)
    return {"out_y": y, "out_final_state": state, "out_y_zero_init": y_zero, "out_final_state_zero_init": state_zero}


def _mixer(case: Mapping, config: Mapping) -> Mamba2Mixer:
    options = {key: config[key] for key in MIXER_OPTIONS if key in config}
    return fill_listed(Mamba2Mixer(config["d_model"], **options), case)


def _mamba_block(case: Mapping, config: Mapping, x: Arrays) -> Outputs:
    block, u = _mixer(case, config), x["in_u"].requires_grad_()
    y = block(u)
    (y * x["in_cotangent"]).sum().backward()
    gradients = {"u": u.grad, "conv_weight": block.conv1d.weight.grad, "norm_weight": block.norm.weight.grad}
    gradients |= {name: parameter.grad for name, parameter in block.named_parameters()}
    return {"out_y": y} | {f"out_grad_{name}": value for name, value in gradients.items()}


@torch.no_grad()
def _mamba_step(case: Mapping, config: Mapping, x: Arrays) -> Outputs:
    block, outputs = _mixer(case, config), []
    state = StepState(x["in_conv_state"], x["in_ssm_state"])
    for u_BM in x["in_u"].unbind(1):
        y_BM, state = block.step(u_BM, state)
        outputs.append(y_BM)
    return {"out_y": torch.stack(outputs, 1), "out_conv_state": state.conv_BCK, "out_ssm_state": state.ssm_BHPN}


def _stack(case: Mapping, config: Mapping, x: Arrays) -> Outputs:
    keys = " ".join(key for key, _ in case["state_dict"])
    layers, positions = config.get("num_layers", 2), x["in_pe"]
    stack: Stack
    if "mamba_forward" in keys:
        options = {key: config[key] for key in MIXER_OPTIONS if key in config}
        stack = MambaStack(positions, layers, post_d_model=config.get("post_d_model"), **options)
    elif "lstm_forward" in keys:
        stack = LSTMStack(positions, layers, dropout=config.get("dropout", 0.0))
    elif "transformer_forward" in keys:
        stack = TransformerStack(
            positions, layers, num_heads=config["nhead"], head_size=config["dim_head"],
            feedforward=config["dim_feedforward"], attention="released",
        )  # fmt: skip
    else:
        stack = GatedMLPStack(positions, layers, expand=config["expand"])
    assert set(stack.state_dict()) == {key for key, _ in case["state_dict"]}
    return {"out_prototypes": fill_listed(stack, case)(x["in_condition"])}


# ------------------------------------------------------------------------------------------- denoiser and diffusion


def _denoiser(case: Mapping, config: Mapping) -> ConvDenoiser:
    return fill_listed(
        ConvDenoiser(
            config["layer_channels"], config["model_dim"], config["condition_dim"], kernel_size=config["kernel_size"]
        ),
        case,
    )


def _unet(case: Mapping, config: Mapping, x: Arrays) -> Outputs:
    net = _denoiser(case, config)
    x_RD = x["in_x"].requires_grad_()
    outputs: Outputs = {"out_time_embedding": net.time_embedder(x["in_t"])}
    outputs["out_eval"] = net.eval()(x_RD, x["in_t"], x["in_c"])
    outputs["out_train"] = net.train()(x_RD, x["in_t"], x["in_c"])
    (outputs["out_train"] * x["in_cotangent"]).sum().backward()
    outputs["out_grad_x"] = x_RD.grad
    state = net.state_dict()
    for name in outputs_wanted(case):
        if name.startswith("out_after_"):
            outputs[name] = state[name.removeprefix("out_after_")]
    return outputs


def _diffusion_loss(case: Mapping, config: Mapping, x: Arrays) -> Outputs:
    net, diffusion = _denoiser(case, config), TokenDiffusion(linear_tables(*config["beta"], config["T"]))
    x0, t, eps = x["in_x0"], x["in_t"], x["in_eps"]
    valid, x_t = ~torch.isnan(x0), diffusion.noise(x0, t, eps)

    def loss() -> Tensor:
        return (net(x_t, t, x["in_c"]) - diffusion.target(x0, t, eps))[valid].square().mean()

    net.eval()
    loss_eval = loss()
    loss_eval.backward()
    gradients = {
        "out_grad_first_conv": net.encoder_list[0][0].weight.grad.clone(),
        "out_grad_condi_embedder": net.condi_embedder.weight.grad.clone(),
    }
    net.train()
    return {"out_x_t": x_t, "out_loss_eval": loss_eval, "out_loss_train": loss(), **gradients}


@torch.no_grad()
def _sampling(case: Mapping, config: Mapping, x: Arrays) -> Outputs:
    net, tables = _denoiser(case, config).eval(), linear_tables(*config["beta"], config["T"])

    def predict(x_RD: Tensor, t: int) -> Tensor:
        return net(x_RD, torch.full((len(x_RD),), t), x["in_c"])

    def noise(index: int) -> Tensor:
        return x["in_noise"][index]

    if config["kind"] == "ddpm":
        states = ddpm(predict, x["in_x"], tables, noise)
    else:
        states = ddim(
            predict, x["in_x"], tables, noise, steps=config["steps"], eta=config["eta"],
            grid=config.get("skip_type", config.get("grid", "linear")),
        )  # fmt: skip
    last, kept = trajectory(states, x["in_x"], config.get("interval", 1))
    return {"out_x0": last, "out_trajectory": kept}


# ------------------------------------------------------------------------------------------- whole generators


def _generator_config(case: Mapping, config: Mapping, x: Arrays) -> GeneratorConfig:
    keys = {key for key, _ in case["state_dict"]}
    condition = "none"
    if "to_condition_gate" in keys:
        condition = "gated"
    elif any(key.startswith("to_condition_conv") for key in keys):
        condition = "full"
    elif "in_condition" in x:
        condition = "linear"
    diffusion = {}
    if "layer_channels" in config:
        diffusion = {
            "channels": tuple(config["layer_channels"]),
            "kernel_size": config["kernel_size"],
            "beta": tuple(config["beta"]),
            "diffusion_steps": config["T"],
        }
    return GeneratorConfig(
        num_tokens=config["sequence_length"],
        dim_per_token=config["dim_per_token"],
        num_states=config["num_permutation"],
        head="diffusion" if diffusion else "mse",
        d_model=config["d_model"],
        d_state=config["d_state"],
        d_conv=config["d_conv"],
        expand=config["expand"],
        num_layers=config["num_layers"],
        condition=condition,
        condition_size=x["in_condition"].shape[-1] if "in_condition" in x else 0,
        d_condition=config["d_condition"],
        **diffusion,
    )


def _generator(case: Mapping, config: Mapping, x: Arrays) -> Outputs:
    options = _generator_config(case, config, x)
    model = fill_listed(Generator(options, x["in_pe"]), case).eval()
    x0_BLD = x["in_x0"]
    networks, tokens = x0_BLD.shape[:2]
    states, condition = x.get("in_permutation_state"), x.get("in_condition")
    prototypes_BLP = model.prototypes(states, condition)
    outputs: Outputs = {"out_prototypes": prototypes_BLP.expand(networks, -1, -1)}
    rows = torch.arange(networks * tokens)
    if config.get("forward_once"):
        rows = x["in_token_permutation"][: config["diffusion_batch"]]
    # the released loss is the mean over chunks weighted by their rows, ours the mean over all values
    size, total = config.get("diffusion_batch") or len(rows), 0.0
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        x0_RD = x0_BLD.flatten(0, 1)[part]
        drawn = {
            name: x[key][first : first + size] for name, key in (("t_R", "in_t"), ("eps_RD", "in_eps")) if key in x
        }
        summed = model(x0_RD, part // tokens, part % tokens, state_B=states, condition_BE=condition, **drawn)
        total = total + summed / (~torch.isnan(x0_RD)).sum() * len(part) / len(rows)
    outputs["out_loss"] = total
    if "in_sample_x" in x:
        outputs["out_sample"] = _sample(model, x, states, condition)
    return outputs


@torch.no_grad()
def _sample(model: Generator, x: Arrays, states: Tensor | None, condition: Tensor | None) -> Tensor:
    state = None if states is None else torch.tensor([model.config.num_states - 1])
    prototypes_LP = model.prototypes(state, None if condition is None else condition[:1])[0]

    def predict(x_LD: Tensor, t: int) -> Tensor:
        return model.denoiser(x_LD, torch.full((len(x_LD),), t), prototypes_LP)

    states_iterator = ddpm(
        predict, x["in_sample_x"][0], model.diffusion.tables, lambda index: x["in_sample_noise"][index]
    )
    return trajectory(states_iterator, x["in_sample_x"][0], 1)[0][None]


Kind = tuple[Callable[[Mapping, Mapping, Arrays], bool], Callable[[Mapping, Mapping, Arrays], Outputs]]
OWN: list[Kind] = [
    (lambda case, config, x: "length_1d" in config, _positions),
    (lambda case, config, x: "out_posterior_variance" in case.get("arrays", ()), _schedule),
    (lambda case, config, x: "in_initial_state" in x, _scan),
    (lambda case, config, x: "in_u" in x and "in_cotangent" in x, _mamba_block),
    (lambda case, config, x: "in_u" in x and "in_ssm_state" in x, _mamba_step),
    (lambda case, config, x: {"in_pe", "in_condition"} == x.keys(), _stack),
    (lambda case, config, x: "in_cotangent" in x and "condition_dim" in config, _unet),
    (lambda case, config, x: config.get("kind") in ("ddpm", "ddim"), _sampling),
    (lambda case, config, x: {"in_pe", "in_x0"} <= x.keys(), _generator),
    (lambda case, config, x: {"in_x0", "in_c", "in_eps"} <= x.keys(), _diffusion_loss),
]


def kinds() -> list[Kind]:
    """All kinds; those of other files are imported late, because they use this one."""
    import importlib
    import importlib.util

    found = list(OWN)
    for name in ("golden_codec", "golden_tasks", "golden_novelty", "golden_pdiff"):
        if importlib.util.find_spec(f"tests.rpg.{name}") is not None:
            found += importlib.import_module(f"tests.rpg.{name}").KINDS
    return found
