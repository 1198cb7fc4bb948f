"""Golden cases of the tokens: statistics, tokens, positions, restored tensors; see ``golden_adapter``."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from rpg.codec import TokenCodec, layer_to_token
from rpg.positions import token_positions
from rpg.structure import compute_structure

POSITION_KINDS = {0: "none", 1: "1d", 2: "2d"}


def _state_dicts(case: Mapping, x: Mapping[str, Tensor], config: Mapping) -> list[dict[str, Tensor]]:
    """The checkpoints in their order, each with its keys in the configuration's order."""
    return [
        {name: x[f"in_ck{index}/{name}"] for name in config["shapes"]} for index in range(config["num_checkpoints"])
    ]


def _tokenise(case: Mapping, config: Mapping, x: Mapping[str, Tensor]) -> dict[str, object]:
    checkpoints = _state_dicts(case, x, config)
    structure = compute_structure(checkpoints)
    outputs: dict[str, object] = {}
    for entry in structure.entries:
        if entry.kind == "varying":
            scale = [] if entry.scale is None else [entry.scale]
            outputs[f"out_stats/{entry.name}"] = torch.tensor([*scale, entry.mean, entry.std])
        else:
            outputs[f"out_const/{entry.name}"] = entry.value
    for granularity in config["granularities"]:
        codec = TokenCodec(structure, config["dim_per_token"], granularity, float(config["fill_value"]))
        tokens_LD = codec.encode(checkpoints[1])  # the case says so in words
        outputs[f"out_tokens_g{granularity}"] = tokens_LD
        for name, tensor in codec.decode(tokens_LD).items():
            outputs[f"out_roundtrip_g{granularity}/{name}"] = tensor
        for name, tensor in codec.decode(x[f"in_gen_tokens_g{granularity}"]).items():
            outputs[f"out_gen_g{granularity}/{name}"] = tensor
        for kind, spelled in POSITION_KINDS.items():
            if f"out_pe{kind}_g{granularity}" in case["arrays"]:
                outputs[f"out_pe{kind}_g{granularity}"] = token_positions(codec, spelled, config["pe_dim"])
    return outputs


def _single_tensors(case: Mapping, config: Mapping, x: Mapping[str, Tensor]) -> dict[str, object]:
    outputs = defaultdict(lambda: None)
    for name in case["arrays"]:
        if name.startswith("out_x"):
            source, granularity = name.removeprefix("out_").split("_g")
            outputs[name] = layer_to_token(
                x[f"in_{source}"], config["dim_per_token"], int(granularity), float(config.get("fill_value", "nan"))
            )
    return dict(outputs)


KINDS = [
    (lambda case, config, x: "granularities" in config and "num_checkpoints" in config, _tokenise),
    (lambda case, config, x: isinstance(config.get("shapes"), list) and "dim_per_token" in config, _single_tensors),
]
