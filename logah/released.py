"""Hypernetworks of the reference implementations: their state dicts and options read, and ours written in their layout.

The published GHN-3 and GHN-2 files are state dicts without options, so every size is read off the tensors. A checkpoint
of the reference's trainer holds ``state_dict``, ``config`` (a dictionary), ``args`` (an ``argparse.Namespace``),
``epoch``, ``step`` and perhaps ``ema_state_dict``; there the options are taken from it and checked against the tensors.

Dimensions: d width of the encoder, r rank, K rows of a factor.

Source: checkpoints of GHN-2 and GHN-3 (Knyazev et al., 2021 and 2023) and of LoGAH (arXiv 2405.16287).
"""

import argparse
import logging
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import CheckpointError
from common.seeding import generator
from logah.model_config import DEFAULT_SPATIAL, HyperNetworkConfig
from logah.primitives import NUM_PRIMITIVES
from logah.shape_encoder import LLM_CHANNELS
from logah.unpickling import read_pickled

State = dict[str, Tensor]
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".joblib")
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
ALIASES = {"decoder.seq.1.": "decoder.l2."}  # one linear layer under two names
TOP_LEVEL = ("centrality_embed_in.", "centrality_embed_out.", "input_dist_embed.")
"""Tables of the first layer that the published files hold beside the layers."""
SHORT_SPATIAL = 11  # largest kernel of the small-image models
NEW_ROW_STD = 0.02

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Released:
    """Contents of a file of the reference.

    Attributes:
        state: under the names of our modules, every tensor once.
        options: the trainer's ``config``; empty in a published file.
        arguments: of the trainer's command line.
        facts: ``epoch``, ``step``, ``weights`` (``raw`` or ``ema``).
    """

    state: State
    options: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def read_released(path: Path | str, *, ema: bool = True) -> Released:
    """A published file or a checkpoint of the reference's trainer; nothing in it is executed.

    Args:
        ema: the moving average where the file has one.

    Raises: CheckpointError if the file is damaged, holds something else, or two copies of a tensor differ.
    """
    path = Path(path)
    content = read_pickled(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a state dict is needed.")
    options, arguments, facts = {}, {}, {}
    state = content
    if isinstance(content.get("state_dict"), Mapping):
        state = dict(content["state_dict"])
        options = _plain(content.get("config"), f"{path}: config")
        arguments = _plain(content.get("args"), f"{path}: args")
        facts = {key: content[key] for key in ("epoch", "step") if isinstance(content.get(key), int)}
        averages = content.get("ema_state_dict")
        if ema and isinstance(averages, Mapping) and averages:
            state = _averaged(state, averages, path)
            facts["weights"] = "ema"
        else:
            facts["weights"] = "raw"
    mapped = zipfile.is_zipfile(path)  # a trainer that goes on would write over such tensors
    tensors = {str(name): _tensor(value, copy=mapped) for name, value in state.items()}
    present = {name: value for name, value in tensors.items() if value is not None}
    return Released(own_layout(present, str(path)), options, arguments, facts)


def _plain(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, argparse.Namespace):
        return dict(vars(value))
    if isinstance(value, Mapping):
        return dict(value)
    raise CheckpointError(f"{where} is a {type(value).__name__}, not a dictionary; copy the file again.")


def _tensor(value: Any, *, copy: bool) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach().clone() if copy else value.detach()
    return torch.from_numpy(value) if type(value).__module__ == "numpy" else None


def _averaged(state: Mapping[str, Tensor], averages: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The averages, which name each parameter once, and what they do not name."""
    averages = {WRAPPERS.sub("", name): value for name, value in averages.items()}
    plain = {WRAPPERS.sub("", name): value for name, value in state.items()}
    if unknown := sorted(averages.keys() - plain.keys()):
        raise CheckpointError(f"{path}: ema_state_dict holds {unknown[0]}, which state_dict does not; use ema=false.")
    merged = plain | averages
    for alias, original in ALIASES.items():  # averages name a shared tensor once, under either name
        for leaf in ("weight", "bias"):
            pair = [alias + leaf, original + leaf]
            averaged = [averages[name] for name in pair if name in averages]
            if len(averaged) == 1:
                merged |= {name: averaged[0] for name in pair if name in plain}
    return merged


# ------------------------------------------------------------------------------------------------------- names


def own_layout(state: Mapping[str, Tensor], source: str) -> State:
    """A reference's state dict under our names: no wrappers' prefixes, no copies, linear weights with two sizes.

    Raises: CheckpointError if a copy differs from its original, or stands alone with another one, naming both.
    """
    found: State = {}
    for name, value in state.items():
        name = WRAPPERS.sub("", name)
        if name.startswith(TOP_LEVEL):
            name = f"gnn.0.{name}"
        if name.startswith("decoder") and value.dim() == 4 and value.shape[2:] == (1, 1):
            value = value[:, :, 0, 0]  # GHN-2's decoder is made of 1x1 convolutions
        if name in found and not _equal(found[name], value):
            raise CheckpointError(f"{source} holds {name} twice with different values; copy the file again.")
        found[name] = value
    return drop_aliases(found, source)


def drop_aliases(state: Mapping[str, Tensor], source: str = "the state dict") -> State:
    """Without second names of a tensor; a second name without the first one takes its place.

    Raises: CheckpointError if the two differ.
    """
    kept = {name: value for name, value in state.items() if not name.startswith(tuple(ALIASES))}
    for alias, original in ALIASES.items():
        for name in [name for name in state if name.startswith(alias)]:
            first = original + name.removeprefix(alias)
            if not _equal(kept.setdefault(first, state[name]), state[name]):
                raise CheckpointError(
                    f"{source}: {name} differs from {first}; in a hypernetwork they are one tensor, so the file is "
                    "damaged or was put together of two."
                )
    return kept


def add_aliases(state: Mapping[str, Tensor]) -> State:
    """The reference's layout: the shared linear layer under both names."""
    full = dict(state)
    for alias, original in ALIASES.items():
        full |= {alias + k.removeprefix(original): v for k, v in state.items() if k.startswith(original)}
    return full


def _equal(left: Tensor, right: Tensor) -> bool:
    same = left.shape == right.shape and left.dtype == right.dtype
    return same and (left.data_ptr() == right.data_ptr() or torch.equal(left, right))


# ------------------------------------------------------------------------------------------------------- options


def infer_config(released: Released, source: str, **overrides: Any) -> HyperNetworkConfig:
    """Options of the hypernetwork: those given, else those stored, else what the tensors show.

    Args:
        overrides: by the names of ``HyperNetworkConfig``; None: not given. A published low-rank file shows neither
            ``max_shape`` nor ``num_classes``, and none shows ``heads``, ``attention`` and ``ve_cutoff``.

    Raises: CheckpointError if the tensors are no hypernetwork's, or contradict a stored option (both are named).
    """
    seen = sizes_of(released.state, source)
    stored = stored_options(released.options, released.arguments)
    given = {name: value for name, value in overrides.items() if value is not None}
    for name in ("hid", "layers", "lora_r", "max_ck_lora", "decoder", "num_classes"):
        for origin, values in (("config", stored), ("option", given)):
            if name in values and name in seen and values[name] != seen[name]:
                raise CheckpointError(
                    f"{source}: its tensors have {name}={seen[name]}, but its {origin} says {name}={values[name]}; "
                    "the file was put together of two, or the option is wrong."
                )
    options = guessed_options(seen, released.state) | seen | stored | given
    told = seen | stored | given | ({} if seen["decoder"] == "lowrank" else {"max_shape": None})
    config = HyperNetworkConfig(**options)
    unsure = ("max_shape", "num_classes", "heads", "attention", "ve_cutoff")
    taken = ", ".join(f"{name}={getattr(config, name)}" for name in unsure if name not in told)
    if taken:
        logger.info("%s does not say everything; taken as in the published models: %s", source, taken)
    return config


def sizes_of(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """What the tensors' shapes say for certain, by the names of ``HyperNetworkConfig``.

    Raises: CheckpointError naming a tensor that every hypernetwork has and this file lacks.
    """

    def rows(name: str) -> int:
        if name not in state:
            some = ", ".join(list(state)[:5]) or "no tensors"
            raise CheckpointError(f"{source} is no complete hypernetwork: it lacks {name} and holds {some}.")
        return state[name].shape[0]

    primitives = rows("embed.weight")
    found: dict[str, Any] = {
        "hid": state["embed.weight"].shape[1],
        "variant": "vision" if primitives <= NUM_PRIMITIVES["vision"] else "llm",
        "layernorm": "ln.weight" in state,
    }
    if any(name.startswith("gnn.gru.") for name in state):
        found |= {"decoder": "ghn2", "layers": 1, "virtual_edges": "gnn.mlp_ve.fc.0.weight" in state}
    else:
        found["layers"] = sum(re.fullmatch(r"gnn\.\d+\.ln1\.weight", name) is not None for name in state)
        rows("gnn.0.ln1.weight")
        found["virtual_edges"] = "gnn.0.attn.edge_embed.embed.weight" in state
    if "decoder.l2.weight" in state:
        found |= {"decoder": "lowrank", "max_ck_lora": rows("decoder.l2.weight"), "lora_r": rows("decoder.l1.weight")}
        found["use_1d_decoder"] = "decoder_1d.fc.0.weight" in state
        if found["use_1d_decoder"]:
            found["num_classes"] = rows("bias_class.1.weight")
    else:
        found.setdefault("decoder", "dense")
        found["num_classes"] = rows("decoder.class_layer_predictor.1.weight")
    return found


def guessed_options(seen: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes leave open, by the habits of the published models."""
    table = state.get("shape_enc.embed_spatial.weight")
    spatial = SHORT_SPATIAL if table is not None and len(table) == 9 else DEFAULT_SPATIAL
    if seen["decoder"] == "lowrank":
        channels = max(1, seen["max_ck_lora"] // DEFAULT_SPATIAL)
        shape = (channels, channels)
    else:
        shape = _dense_shape(state)
    return {
        "num_classes": 10,
        "heads": 16 if seen["hid"] > 64 else 8,
        "max_shape": (*shape, spatial, spatial),
    }


def _dense_shape(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """(outputs, inputs) that a dense decoder makes; square unless the class head's inputs say otherwise."""
    both = state["decoder.conv.2.weight"].shape[0] if "decoder.conv.2.weight" in state else 1
    outputs = math.isqrt(both)
    head = state.get("decoder.class_layer_predictor.1.weight")
    if head is not None and both % head.shape[1] == 0:
        outputs = head.shape[1]
    return outputs, both // outputs


def stored_options(options: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The reference trainer's ``config`` and ``args`` by our names; what it does not say is left out."""
    found: dict[str, Any] = {}
    same = ("hid", "layers", "heads", "lora_r", "max_ck_lora", "num_classes", "max_shape")
    for name in same:
        if options.get(name) is not None:
            found[name] = options[name]
    if "max_shape" in found and not isinstance(found["max_shape"], int):
        found["max_shape"] = tuple(int(size) for size in found["max_shape"])
    if options.get("lora") is not None:
        found["decoder"] = "lowrank" if options["lora"] else "dense"
        if not options["lora"]:
            found = {name: value for name, value in found.items() if name not in ("lora_r", "max_ck_lora")}
    if options.get("is_ghn2"):
        found = {name: value for name, value in found.items() if name not in ("heads", "layers")} | {"decoder": "ghn2"}
    if options.get("weight_norm") is False:
        found["normalisation"] = "none"
    cutoff = arguments.get("virtual_edges")
    if isinstance(cutoff, int) and cutoff >= 1:
        found["ve_cutoff"] = cutoff
    elif options.get("ve") is False:  # such a model was shown edges only
        found["ve_cutoff"] = 1
    return found


def reference_options(config: HyperNetworkConfig) -> dict[str, Any]:
    """The ``config`` of the reference's trainer for a hypernetwork of ours.

    Raises: CheckpointError for a decoder that the reference does not have.
    """
    if config.decoder not in ("lowrank", "dense"):
        raise CheckpointError(f"to=reference: the reference has no decoder={config.decoder}; use to=quintet.")
    lora = config.decoder == "lowrank"
    return {
        "max_shape": tuple(config.max_shape),
        "num_classes": config.num_classes,
        "hypernet": "gatedgnn",  # its command line's default, read by GHN-2 only
        "decoder": "conv",
        "lora": lora,
        "lora_r": config.lora_r,
        "max_ck_lora": config.max_ck_lora,
        "use_1d_decoder": config.use_1d_decoder or not lora,
        "weight_norm": config.rule != "none",
        "ve": config.virtual_edges,
        "layernorm": config.layernorm,
        "hid": config.hid,
        "layers": config.layers,
        "heads": config.heads,
        "is_ghn2": False,
    }


# ------------------------------------------------------------------------------------------------------- tables


def extend_tables(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], source: str) -> State:
    """Adds the rows that language models have and a vision model's tables lack.

    New node types get draws of deviation 0.02 from a generator of their own. New channel counts go before the last
    row, which stands for "no shape"; they start as copies of the largest count that was known.

    Args:
        shapes: of the model that the state is for.
    """
    full = dict(state)
    name = "embed.weight"
    if (missing := _missing_rows(full, shapes, name)) > 0:
        rng = generator(0, "logah-new-node-types")
        new = NEW_ROW_STD * torch.randn(missing, full[name].shape[1], generator=rng, dtype=torch.float32)
        full[name] = torch.cat([full[name], new.to(full[name].dtype)])
        logger.warning("%s: %d node types are new to it; their embeddings are random.", source, missing)
    name = "shape_enc.embed_channel.weight"
    missing = _missing_rows(full, shapes, name)
    if missing > 0 and missing <= len(LLM_CHANNELS) and len(full[name]) > 1:
        known, absent = full[name][:-1], full[name][-1:]
        full[name] = torch.cat([known, known[-1:].expand(missing, -1), absent])
        logger.warning("%s: %d channel counts are new to it; they start as the largest known.", source, missing)
    return full


def _missing_rows(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    if name not in state or name not in shapes or state[name].shape[1:] != tuple(shapes[name][1:]):
        return 0
    return shapes[name][0] - state[name].shape[0]
