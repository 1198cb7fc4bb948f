"""Checkpoints of the reference implementations: DiT's ``.pt``, PixArt-alpha's ``.pth``.

They carry no configuration, so sizes are read off the tensors. The number of heads is in no tensor: it comes from the
caller, from the options stored beside the weights, or from a head size of 72.

Dimensions: N tokens, D width.

Source: specification 3.7.
"""

import argparse
import logging
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import CheckpointError, ConfigError
from mup_dit.building import BASE_HEADS, ModelConfig
from mup_dit.dit import HEAD_SIZE, DiTConfig
from mup_dit.pixart import PixArtConfig

State = dict[str, Tensor]
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
AVERAGED, PLAIN = ("ema", "state_dict_ema"), ("model", "state_dict")
PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")
AUTO_SHAPES = "auto"  # base shapes of four heads, as all released muP checkpoints have

logger = logging.getLogger(__name__)


@dataclass
class Released:
    """Contents of a checkpoint.

    Attributes:
        state: tensors by our names.
        options: command line that it was trained with, where it is stored.
        averaged: whether ``state`` is the moving average.
    """

    state: State
    options: Mapping[str, Any] = field(default_factory=dict)
    averaged: bool = False


def read_released(path: Path | str, *, use_ema: bool = True) -> Released:
    """Tensors and options of a checkpoint; nothing is executed (``weights_only``, with ``argparse.Namespace`` allowed).

    Args:
        use_ema: the moving average where there is one.

    Raises: CheckpointError if the file is missing, damaged, holds other objects, or no tensors.
    """
    path = Path(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_map(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give a checkpoint, a run folder or a hub name.") from None
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path} cannot be read without executing what it holds"
            f"{f' ({named[1]})' if named else ''}; only tensors, plain values and argparse.Namespace are read. Save "
            "its state dict alone with the program that made it."
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is no readable checkpoint ({_first_line(error)}); copy it again.") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a state dict is needed.")
    wanted = (*AVERAGED, *PLAIN) if use_ema else (*PLAIN, *AVERAGED)
    key = next((name for name in wanted if isinstance(content.get(name), Mapping) and content[name]), None)
    tensors = content if key is None else content[key]
    state = {PREFIXES.sub("", str(name)): value for name, value in tensors.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{path} holds {', '.join(map(str, list(content)[:5]))}, but no weights.")
    options = content.get("args") or content.get("config") or {}
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    return Released(state, options if isinstance(options, Mapping) else {}, averaged=key in AVERAGED)


def infer_config(
    released: Released,
    source: str,
    *,
    heads: int | None = None,
    base_shapes: str | None = None,
    output_mult: float | None = None,
) -> ModelConfig:
    """The network's configuration from shapes, stored options and what the caller says.

    Args:
        heads: number of attention heads.
        base_shapes: a ``.bsh`` file, or ``auto`` (4 heads), which makes it a muP checkpoint.
        output_mult: of the readout of a muP checkpoint; None: stored, or 1.

    Raises: CheckpointError for a muP checkpoint without base shapes, an unknown number of heads, or tensors of neither
        model.
    """
    state, options = released.state, released.options
    kind = "pixart" if "t_block.1.weight" in state else "dit"
    needed = ["x_embedder.proj.weight", "final_layer.linear.weight", "blocks.0.attn.qkv.weight"]
    needed.append("t_block.1.weight" if kind == "pixart" else "y_embedder.embedding_table.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise CheckpointError(f"{source} is neither a DiT nor a PixArt-alpha: it lacks {', '.join(missing)}.")
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    out = state["final_layer.linear.weight"].shape[0] // patch**2
    is_mup = bool(options.get("mup")) or base_shapes is not None
    if is_mup and base_shapes is None:
        raise CheckpointError(
            f"{source} was trained by muP: without its base shapes the readout would be off by the width multiplier. "
            f"Give base_shapes=FILE.bsh, or base_shapes={AUTO_SHAPES} for a base of {BASE_HEADS} heads."
        )
    if output_mult is None:
        output_mult = 2.0 ** float(options.get("logstd") or 0)
    shared = {
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "hidden_size": width,
        "num_heads": _heads(width, heads or options.get("num_heads"), source, asked=heads is not None),
        "patch_size": patch,
        "in_channels": channels,
        "learn_sigma": out == 2 * channels,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "output_mult": float(output_mult) if is_mup else 1.0,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
    }
    network = (_pixart if kind == "pixart" else _dit)(state, options, shared, source)
    return ModelConfig(
        family=kind,
        parametrization="mup" if is_mup else "sp",
        network=network,
        base_shapes=None if base_shapes in (None, AUTO_SHAPES) else str(base_shapes),
    )


def _dit(state: State, options: Mapping[str, Any], shared: dict, source: str) -> DiTConfig:
    rows = state["y_embedder.embedding_table.weight"].shape[0]
    classes = options.get("num_classes") or rows - 1
    if rows - classes not in (0, 1):
        raise CheckpointError(f"{source}: {rows} label rows do not fit num_classes={classes}.")
    if "pos_embed" not in state:
        raise CheckpointError(f"{source} has no pos_embed, so the size of its images is unknown.")
    return DiTConfig(
        **shared,
        input_size=_side(state["pos_embed"], source) * shared["patch_size"],
        num_classes=classes,
        class_dropout_prob=0.1 if rows > classes else 0.0,
    )


def _pixart(state: State, options: Mapping[str, Any], shared: dict, source: str) -> PixArtConfig:
    grid, scale = 32 // shared["patch_size"], 1.0
    if "pos_embed" in state:
        grid = _side(state["pos_embed"], source)
        if grid > 1:
            # second token, first channel: the sine of column 1 at frequency 1, that is of 1 / scale
            sine = float(state["pos_embed"].reshape(-1, shared["hidden_size"])[1, 0])
            scale = round(1.0 / math.asin(min(max(sine, 1e-3), 1.0)), 3)
    else:
        logger.warning("%s has no pos_embed; it is taken for a model of 256 x 256 pixels.", source)
    length, channels = state["y_embedder.y_embedding"].shape
    return PixArtConfig(
        **shared,
        input_size=grid * shared["patch_size"],
        caption_channels=channels,
        model_max_length=length,
        # 1/asin(sin(1)) is 1 up to rounding; below it the sine is not unique, and no released model is there
        lewei_scale=scale if scale > 1.01 else 1.0,
        micro_conditions="csize_embedder.mlp.0.weight" in state,
    )


def _side(table: Tensor, source: str) -> int:
    tokens = table.shape[-2]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise CheckpointError(f"{source}: pos_embed has {tokens} tokens, which is no square.")
    return side


def _heads(width: int, heads: int | None, source: str, *, asked: bool) -> int:
    if heads is None:
        if width % HEAD_SIZE:
            raise CheckpointError(
                f"{source}: no tensor tells the number of heads, and width {width} is no multiple of the head size "
                f"{HEAD_SIZE}; give heads=... (DiT-S 6, B 12, L 16)."
            )
        logger.info("%s: %d heads of size %d are assumed; heads=... says otherwise.", source, width // 72, HEAD_SIZE)
        return width // HEAD_SIZE
    if heads < 1 or width % heads:
        where = "heads" if asked else "the stored num_heads"
        raise ConfigError(f"{where}={heads} does not divide the width {width} of {source}.")
    return int(heads)


def _can_map(path: Path) -> bool:
    """Whether the file has torch's zip format, whose tensors need not be read at once."""
    return zipfile.is_zipfile(path)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
