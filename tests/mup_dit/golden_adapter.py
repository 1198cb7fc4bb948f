"""Golden cases of DiT and PixArt-alpha through the public functions; dispatches on what a case holds, not on its name.

Kinds are listed in ``KINDS`` with a predicate each; the first that fits computes the case. A kind's function returns
what it computes by the names that the case uses: arrays ``out*``, or keys of the description (``rows``, ``entries``).
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from common.testing.golden import fill
from mup_dit.building import ModelConfig, Network, build_model, build_skeleton, compute_base_shapes
from mup_dit.dit import DiTConfig
from mup_dit.layers import LabelEmbedder, TimestepEmbedder, position_table, timestep_embedding, unpatchify
from mup_dit.optimizer_groups import mup_groups
from mup_dit.pixart import PixArtConfig
from tests.mup_dit import golden_coordinates, golden_data, golden_diffusion, golden_metrics

Arrays = Mapping[str, Tensor]
NETWORK_OPTIONS = (
    "depth", "hidden_size", "num_heads", "patch_size", "input_size", "in_channels", "num_classes", "learn_sigma",
    "output_mult", "caption_channels", "model_max_length",
)  # fmt: skip


def run(name: str, case: Mapping, arrays: Mapping[str, np.ndarray]) -> dict[str, object]:
    """Everything this repository computes for a case; names of outputs are those of the case."""
    inputs = {key: torch.from_numpy(np.asarray(value)) for key, value in arrays.items() if key.startswith("in")}
    config = case.get("config") or {}
    for fits, compute in KINDS:
        if fits(case, config, inputs):
            return compute(case, config, inputs)
    raise KeyError(f"{name}: no rule for a case with config {sorted(config)} and inputs {sorted(inputs)}")


def build(case: Mapping, config: Mapping) -> Network:
    """The case's network with its deterministic weights."""
    options = {key: value for key, value in config.items() if key in NETWORK_OPTIONS}
    is_pixart = "caption_channels" in config or "num_classes" not in config
    network = (PixArtConfig if is_pixart else DiTConfig)(**options)
    base = config.get("base_hidden_size")
    model_config = ModelConfig(
        family="pixart" if is_pixart else "dit",
        parametrization=config.get("parametrisation", "sp" if base is None else "mup"),
        network=network,
        base_heads=1 if base is None else base // network.head_size,
    )
    model = build_model(model_config)
    return fill(model, case["fill_seed"], case.get("fill_skip", ())).eval()


def _dit_forward(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    model = build(case, config)
    tokens = model.x_embedder(x["in_x"]) + model.pos_embed
    condition = model.t_embedder(x["in_t"]) + model.y_embedder(x["in_y"])
    hidden = tokens
    for block in model.blocks:
        hidden = block(hidden, condition)
    outputs = {
        "out": model(x["in_x"], x["in_t"], x["in_y"]),
        "out_tokens": tokens,
        "out_cond": condition,
        "out_block0": model.blocks[0](tokens, condition),
        "out_final_tokens": model.final_layer(hidden, condition),
    }
    if "in_cfg_x" in x:
        scale = float(config.get("cfg_scale", 1.5))  # the case names it in its description only
        outputs["out_cfg"] = model.forward_with_cfg(x["in_cfg_x"], x["in_cfg_t"], x["in_cfg_y"], scale)
    return outputs


def _pixart_forward(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    model = build(case, config)
    y, t, mask = x["in_y"], x["in_t"], x["in_mask"]
    masked = model(x["in_x"], t, y, mask)
    null = model.y_embedder.y_embedding.expand(len(y), 1, -1, -1)
    guided = model.forward_with_cfg(
        x["in_cfg_x"], torch.cat([t, t]), torch.cat([y, null]), config["cfg_scale"], mask.reshape(len(y), -1)
    )
    return {
        "out_masked": masked,
        "out_unmasked": model(x["in_x"], t, y),
        "out_dpm": model.forward_with_dpmsolver(x["in_x"], t, y, mask),
        "out_cfg": guided,
        "out_t0": model.t_block(model.t_embedder(t)),
        "out_y": model.y_embedder(y),
        "out_y_dropped": model.y_embedder(y, x["in_force_drop"]),
    }


def _labels(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    embedder = fill(LabelEmbedder(config["num_classes"], config["hidden_size"], config["dropout_prob"]),
                    case["fill_seed"])  # fmt: skip
    dropped = embedder(x["in_labels"], x["in_force_drop_ids"])
    return {"out_drop": dropped, "out_eval": embedder(x["in_labels"])}


def _times(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    embedder = fill(TimestepEmbedder(config["hidden_size"], config["frequency_embedding_size"]), case["fill_seed"])
    outputs: dict[str, object] = {"out": embedder(x["in_t"])}
    for name in case["arrays"]:
        t = x["in_t_frac"] if name.endswith("_frac") else x["in_t"]
        if name.startswith("out_sin"):
            outputs[name] = timestep_embedding(t, int(name.removeprefix("out_sin").removesuffix("_frac")))
        elif name == "out_frac":
            outputs[name] = embedder(t)
    return outputs


def _positions(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    """Sizes stand in the outputs' names, ``out_d48_g4`` and ``out_d32_g3_extra`` (2 rows of zeros)."""
    outputs = {}
    for name in case["arrays"]:
        size, grid, *extra = name.removeprefix("out_").split("_")
        side = int(grid.removeprefix("g"))
        outputs[name] = position_table(int(size.removeprefix("d")), (side, side), extra_tokens=2 if extra else 0)
    return outputs


def _scaled_positions(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    return {
        f"out{index}": position_table(size, tuple(grid), scale=scale, base_size=base)
        for index, (size, grid, scale, base) in enumerate(config["cases"])
    }


def _unpatchify(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    return {"out": unpatchify(x["in_tokens"], config["patch_size"], config["out_channels"])}


def _skeleton(config: Mapping) -> tuple[ModelConfig, Network]:
    options = {key: value for key, value in config.items() if key in NETWORK_OPTIONS}
    is_dit = "num_classes" in config
    network = (DiTConfig if is_dit else PixArtConfig)(**options)
    base_heads = config["base_hidden_size"] // network.head_size
    model_config = ModelConfig(family="dit" if is_dit else "pixart", network=network, base_heads=base_heads)
    return model_config, build_skeleton(model_config)


def _table(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    _, model = _skeleton(config)
    rows = []
    for scaling in model.scalings.values():
        row = {
            "name": scaling.name,
            "shape": list(scaling.shape),
            "base_shape": list(scaling.base_shape),
            "ninf": scaling.ninf,
            "width_mult": scaling.width_mult,
            "init_std": None if scaling.init.law == "fixed" else scaling.init.std,
            "lr_mult": scaling.lr_mult,
            "weight_decay_mult": scaling.weight_decay_mult,
        }
        if scaling.init.law == "uniform":
            row["uniform_bound"] = scaling.init.bound
        rows.append(row)
    groups = mup_groups(model.named_parameters(), model.scalings, 1.0)
    return {
        "rows": rows,
        "param_groups": [
            {"lr_mult": group["lr_scale"], "wd_mult": group["weight_decay"], "n": len(group["names"])}
            for group in groups
        ],
    }


def _base_shapes(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    def entries(depth: int) -> dict[str, list]:
        network = DiTConfig(depth=depth, hidden_size=config["base_hidden_size"], num_heads=4)
        shapes = compute_base_shapes(ModelConfig(network=network))
        return {name: list(axes) for name, axes in shapes.items()}

    return {"entries": entries(config["depth"]), "num_keys_depth28": len(entries(28))}


Kind = tuple[Callable[[Mapping, Mapping, Arrays], bool], Callable[[Mapping, Mapping, Arrays], dict[str, object]]]
KINDS: list[Kind] = [
    (lambda case, config, x: "in_mask" in x and "in_force_drop" in x, _pixart_forward),
    (lambda case, config, x: "in_force_drop_ids" in x, _labels),
    (lambda case, config, x: "frequency_embedding_size" in config, _times),
    (lambda case, config, x: "in_tokens" in x, _unpatchify),
    (lambda case, config, x: "rows" in case and "param_groups" in case, _table),
    (lambda case, config, x: "entries" in case, _base_shapes),
    *golden_coordinates.KINDS,
    *golden_diffusion.KINDS,
    *golden_data.KINDS,
    *golden_metrics.KINDS,
    (lambda case, config, x: str(config.get("columns", "")).startswith("embed_dim"), _scaled_positions),
    (lambda case, config, x: any(name.startswith("out_d") and "_g" in name for name in case.get("arrays", ())),
     _positions),
    (lambda case, config, x: {"in_x", "in_t", "in_y"} <= x.keys() and "num_classes" in config, _dit_forward),
]  # fmt: skip
