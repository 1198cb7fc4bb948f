"""Hypernetworks of a few thousand parameters with deterministic weights, and the reference's files of them."""

import argparse
from pathlib import Path
from typing import Any

import joblib
import torch
from torch import Tensor, nn

from common.testing.golden import fill
from logah.checkpoints import build
from logah.model_config import HyperNetworkConfig
from logah.released import add_aliases, reference_options

SMALL: dict[str, Any] = {
    "hid": 16,
    "heads": 8,
    "layers": 2,
    "lora_r": 4,
    "max_ck_lora": 1024,
    "max_shape": (64, 64, 16, 16),
}


def tiny_config(**options: Any) -> HyperNetworkConfig:
    if options.get("decoder") == "dense":
        options = {"max_shape": (16, 16, 16, 16), **options}
    return HyperNetworkConfig(**{**SMALL, **options})


def tiny_hypernetwork(*, seed: int = 3, **options: Any) -> nn.Module:
    """In eval mode, filled with the golden cases' values."""
    with torch.random.fork_rng():
        model = build(tiny_config(**options))
    return fill(model, seed).eval().requires_grad_(False)


def reference_state(model: nn.Module) -> dict[str, Tensor]:
    """All names of the reference's state dict, each tensor a copy of its own as after unpickling."""
    return {name: value.clone() for name, value in add_aliases(dict(model.state_dict())).items()}


def write_published(path: Path, model: nn.Module, *, top_level: bool = True, compress: int = 0) -> Path:
    """As GHN-3's files: a joblib pickle of a state dict, the tables of the first layer at the top."""
    state = reference_state(model)
    if top_level:
        tables = ("gnn.0.centrality_embed_in.", "gnn.0.centrality_embed_out.", "gnn.0.input_dist_embed.")
        state = {k.removeprefix("gnn.0.") if k.startswith(tables) else k: v for k, v in state.items()}
    joblib.dump(state, path, compress=compress)
    return path


def write_trainer_checkpoint(path: Path, model: nn.Module, **extra: Any) -> Path:
    """As LoGAH's trainer writes ``checkpoint.pt``."""
    content = {
        "state_dict": {f"module.{name}": value for name, value in reference_state(model).items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 3e-4, "params": [0, 1]}]},
        "epoch": 7,
        "step": 41,
        "args": argparse.Namespace(lr=3e-4, name="logah", virtual_edges=50, milestones=(200, 250), save=None),
        "config": reference_options(model.config),
        **extra,
    }
    torch.save(content, path)
    return path


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    theirs = expected.state_dict()
    assert found.state_dict().keys() == theirs.keys()
    for name, value in found.state_dict().items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name
