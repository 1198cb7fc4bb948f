"""Golden cases of sampling, by kind: ``HANDLERS`` maps the beginning of a case's name to our outputs.

The handlers have the signature of those in ``golden_adapter``: (name, case, inputs) -> arrays, where the case also
carries ``output_names``.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.diffusion.absorbing import sample_ordered
from common.diffusion.canvas import build_canvas
from common.diffusion.categorical import TokenDraw, draw_tokens
from common.diffusion.nfe import expected_nfe, loglinear_nfe, update_rate
from common.diffusion.orders import check_order
from common.diffusion.schedules import Schedule, build_schedule
from common.diffusion.stepwise import sample_stepwise
from common.diffusion.uniforms import ArrayUniforms
from common.testing.golden import fill
from radd.model import RADD, ModelConfig

Arrays = dict[str, Any]
MASK_BIAS = -1e4  # the truncation cases silence the mask column of the reference


def schedule_of(name: str, config: Mapping[str, Any]) -> Schedule:
    bounds = {key: config[key] for key in ("sigma_min", "sigma_max") if key in config}
    return build_schedule(name, **bounds)


def build_model(config: Mapping[str, Any]) -> RADD:
    proportions = dict(config["model"])
    tokens = proportions.pop("tokens")
    model = RADD(ModelConfig.from_mapping({"dropout": 0.0, **proportions}), tokens)
    return fill(model, config["weights_seed"], skip=("rotary_emb.inv_freq",)).eval()


def update_rates(name: str, case: Mapping[str, Any], inputs: dict[str, Tensor]) -> Arrays:
    outputs = {}
    for key in case["output_names"]:
        noise, method, steps = re.fullmatch(r"out_(\w+)_(\w+)_(\d+)", key).groups()
        outputs[key] = update_rate(
            schedule_of(noise, case["config"]), method, int(steps), case["config"]["eps"], clamp=False
        )
    return outputs


def expected_calls(name: str, case: Mapping[str, Any], inputs: dict[str, Tensor]) -> Arrays:
    free, outputs = inputs["in_l"].tolist(), {}
    for key in case["output_names"]:
        if key.startswith("out_closed_form"):
            outputs[key] = np.array([[loglinear_nfe(n, count)[0] for count in free] for n in inputs["in_n"].tolist()])
            continue
        noise, steps = re.fullmatch(r"out_(\w+)_(\d+)", key).groups()
        schedule = schedule_of(noise, case["config"])
        nfe = [expected_nfe(int(steps), count, schedule, "tweedie", case["config"]["eps"]) for count in free]
        outputs[key] = np.array(nfe)
    return outputs


def categorical(name: str, case: Mapping[str, Any], inputs: dict[str, Tensor]) -> Arrays:
    config = case["config"]
    draws = {
        "out_direct": TokenDraw(),
        "out_top_p": TokenDraw(strategy="top_p", para=config["top_p"]),
        "out_top_k": TokenDraw(strategy="top_k", para=config["top_k"]),
    }
    return {key: draw_tokens(inputs["in_logits"], inputs["in_u"], draw) for key, draw in draws.items()}


def sample(name: str, case: Mapping[str, Any], inputs: dict[str, Tensor], *, cached: bool = True) -> Arrays:
    config = case["config"]
    model = build_model(config)
    strategy = config.get("strategy", "direct")
    if strategy != "direct" and "in_u_update" in inputs:
        with torch.no_grad():
            model.output_layer.linear.bias[-1] = MASK_BIAS
    draw = TokenDraw(strategy=strategy, para=config.get("strategy_para"))
    length, mask_id = config["model"]["length"], model.mask_id

    def denoise(tokens_RL: Tensor, where_RL: Tensor) -> Tensor:
        return model(tokens_RL, where=where_RL)

    ids, positions = inputs.get("in_ids", torch.empty(0)), inputs.get("in_locs", torch.empty(0))
    tokens_BL = build_canvas(
        config["batch"], length, mask_id, num_tokens=mask_id, fixed=(ids.long().tolist(), positions.long().tolist())
    )
    if "in_order" in inputs:
        uniforms = ArrayUniforms(inputs["in_u"].unsqueeze(2))
        order = check_order(inputs["in_order"], length)
        return {
            "out_x": sample_ordered(denoise, tokens_BL, order, mask_id=mask_id, draw=draw, uniforms=uniforms).tokens_BL
        }
    noise = config["noise"] if isinstance(config["noise"], Mapping) else {"type": config["noise"]}
    rate_S = update_rate(build_schedule(**noise), config["method"], config["steps"], config["eps"], clamp=False)
    two_stage = "in_u_update" in inputs
    token = inputs["in_u_cat"] if two_stage else inputs["in_u"]
    result = sample_stepwise(
        denoise,
        tokens_BL,
        rate_S,
        mask_id=mask_id,
        draw=draw,
        stages=2 if two_stage else 1,
        uniforms=ArrayUniforms(token, inputs.get("in_u_update")),
        cached=cached,
        skip_filled=False,
        record=True,
    )
    outputs = {
        "out_x": torch.stack(result.states),
        "out_rate": rate_S[:-1],
        "out_rows_evaluated": result.evaluated_SB.long(),
        "out_changes": result.changed_SB.sum(),
        "out_updated": torch.stack(result.updated).long(),
    }
    if result.weights:
        outputs["out_probs"] = torch.stack(result.weights)
    return outputs


HANDLERS: dict[str, Callable[..., Arrays]] = {
    "update_rate": update_rates,
    "expected_nfe": expected_calls,
    "categorical": categorical,
    "sample_": sample,
}
