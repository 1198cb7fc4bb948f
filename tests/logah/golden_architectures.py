"""Golden cases of generators, noise and similarity; see ``golden_adapter``."""

from collections.abc import Mapping

import numpy as np
from numpy.random import RandomState

from common.testing.golden import fill
from logah.architectures import Architecture
from logah.diversity import layer_diversity
from logah.generators import LAWS
from logah.postprocess import break_symmetry
from tests.logah.golden_graphs import SmallConvNet

COLUMNS = {
    "vit": ("vits1k", ("patch_size", "num_layers", "num_heads", "hidden_dim")),
    "gpt2": ("gpts1k", ("n_layer", "n_embd", "n_head")),
    "llama": ("llama1k", ("num_hidden_layers", "hidden_size", "num_attention_heads")),
}
LLAMA_NAMES = {"n_layer": "num_hidden_layers", "n_embd": "hidden_size", "n_heads": "num_attention_heads"}


def _generators(case: Mapping, config: Mapping, inputs: Mapping) -> dict[str, object]:
    outputs = {}
    for kind, (law, default_columns) in COLUMNS.items():
        if f"out_{kind}" not in case["arrays"]:
            continue
        listed = config.get(f"{kind}_columns", default_columns)
        columns = [LLAMA_NAMES.get(name, name) if kind == "llama" else name for name in listed]
        rng = RandomState(config["seed"])
        drawn: list[Architecture] = [LAWS[law](rng) for _ in range(config["n"])]
        outputs[f"out_{kind}"] = np.array([[each.options[name] for name in columns] for each in drawn])
    return outputs


def _noise(case: Mapping, config: Mapping, inputs: Mapping) -> dict[str, object]:
    network = fill(SmallConvNet(config["net"]["c"], config["net"]["k"]), config["fill_seed"])
    noises = iter([inputs[f"in_noise{place}"] for place in range(len(inputs))])
    break_symmetry(network, config["beta"], draw=lambda name, weight: next(noises))
    state = network.state_dict()
    prefix = "out_after:"
    return {name: state[name.removeprefix(prefix)] for name in case["arrays"] if name.startswith(prefix)}


def _similarity(case: Mapping, config: Mapping, inputs: Mapping) -> dict[str, object]:
    diversity = layer_diversity({str(place): layer for place, layer in enumerate(inputs["in_x"])})
    return {"out_d": diversity.distance_KK, "out_mean": np.float32(diversity.mean)}


KINDS: list = [
    (lambda case, config, inputs: {"seed", "n"} <= config.keys() and not inputs, _generators),
    (lambda case, config, inputs: "beta" in config and "in_noise0" in inputs, _noise),
    (lambda case, config, inputs: "out_d" in case.get("arrays", ()) and "in_x" in inputs, _similarity),
]
