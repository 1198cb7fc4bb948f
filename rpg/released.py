"""Generators of the reference implementation: their ``.pth`` files read, and ours written in their layout.

Such a file is a plain state dict without a configuration. It lists every tensor of the denoiser three times, because
the trainer and the sampler hold the denoiser too, and it holds the tables of the diffusion. Here the copies are
compared and dropped, the tables become numbers of the configuration, and every size is read off the tensors.

Dimensions: L tokens, M model width, P width of a prototype, T diffusion steps, C levels' channels.

Source: layout of the checkpoints of Wang et al. (2025), "Recurrent Diffusion for Large-Scale Parameter Generation".
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import CheckpointError
from rpg.noise_schedule import linear_tables

State = dict[str, Tensor]
SUFFIXES = (".pth", ".pt", ".bin")
NET = "criteria.net."
ALIASES = ("criteria.diffusion_trainer.model.", "criteria.diffusion_sampler.model.")
TABLES = re.compile(r"criteria\.diffusion_(?:trainer|sampler)\.(?!model\.)\w+")
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
STATE_KEY = "to_permutation_state.weight"


def read_released(path: Path | str) -> State:
    """Tensors of a generator file, or of the ``model`` in one that the reference resumes from; wrappers' prefixes go.

    Nothing is executed: only tensors and plain containers are read.

    Raises: CheckpointError if the file is missing, damaged, or holds something else.
    """
    path = Path(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise CheckpointError(
            f"generator={path} does not exist; give a run folder, an export or a .pth file."
        ) from None
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path} cannot be read without executing what it holds{f' ({named[1]})' if named else ''}; only tensors "
            "are read. Save its state dict alone with the program that made it."
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise CheckpointError(f"{path} is no readable checkpoint ({lines[0][:160]}); copy it again.") from None
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a state dict is needed.")
    state = {WRAPPERS.sub("", str(name)): value for name, value in content.items() if isinstance(value, Tensor)}
    if "model.pe" not in state:
        some = ", ".join(list(state)[:5]) or "no tensors"
        raise CheckpointError(f"{path} is no generator: it lacks model.pe and holds {some}.")
    return state


def drop_aliases(state: Mapping[str, Tensor], source: str = "the state dict") -> State:
    """Without the copies of the denoiser and the tables of the diffusion.

    Raises: CheckpointError if a copy differs from the denoiser, or exists without it, naming both.
    """
    kept: State = {}
    for name, value in state.items():
        prefix = next((alias for alias in ALIASES if name.startswith(alias)), None)
        if prefix is None:
            if not TABLES.fullmatch(name):
                kept[name] = value
            continue
        original = NET + name.removeprefix(prefix)
        if original not in state:
            raise CheckpointError(f"{source} holds {name} but not {original}, whose copy it is; copy the file again.")
        if not _equal(value, state[original]):
            raise CheckpointError(
                f"{source}: {name} differs from {original}; in a generator they are one tensor, so the file is damaged "
                "or was put together of two."
            )
    return kept


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)


def add_aliases(
    state: Mapping[str, Tensor], *, beta: tuple[float, float] = (1e-4, 0.02), steps: int = 1000, sampler: str = "ddpm"
) -> State:
    """The reference's layout: our state dict with the tables of the diffusion and the denoiser under all its names.

    Args:
        beta: first and last of the linear schedule.
        steps: T.
        sampler: ``ddpm`` or ``ddim``, whose table the file holds.
    """
    full = dict(state)
    if not any(name.startswith(NET) for name in state):  # without diffusion there is neither
        return full
    tables = linear_tables(*beta, steps)
    trainer, drawer = "criteria.diffusion_trainer.", "criteria.diffusion_sampler."
    full |= {
        f"{trainer}beta_t": tables.beta_T,
        f"{trainer}signal_rate": tables.signal_rate_T,
        f"{trainer}noise_rate": tables.noise_rate_T,
    }
    if sampler == "ddim":
        full[f"{drawer}alpha_t_bar"] = tables.abar_T
    else:
        full |= {
            f"{drawer}beta_t": tables.beta_T,
            f"{drawer}coeff_1": tables.coeff_1_T,
            f"{drawer}coeff_2": tables.coeff_2_T,
            f"{drawer}posterior_variance": tables.posterior_variance_T,
        }
    for name, value in state.items():
        if name.startswith(NET):
            full |= {alias + name.removeprefix(NET): value for alias in ALIASES}
    return full


# ---------------------------------------------------------------- sizes


def read_sizes(state: Mapping[str, Tensor], source: str, *, num_heads: int | None = None) -> dict[str, Any]:
    """Sizes of the generator by the names of ``GeneratorConfig``.

    Args:
        num_heads: of a transformer, the one size that no tensor shows.

    Raises: CheckpointError naming a tensor that is missing or of an unexpected kind.
    """
    sizes: dict[str, Any] = {"num_tokens": state["model.pe"].shape[1], "d_model": state["model.pe"].shape[2]}
    sizes |= _stack_sizes(state, source, num_heads)
    sizes |= _condition_sizes(state, source)
    sizes["num_states"] = state[STATE_KEY].shape[0] if STATE_KEY in state else 0
    if any(name.startswith(NET) for name in state):
        sizes |= _denoiser_sizes(state, source) | _diffusion_sizes(state, source)
    else:
        # the prototypes are the tokens
        sizes |= {"head": "mse", "dim_per_token": sizes.get("post_d_model") or sizes["d_model"]}
    return sizes


def _need(state: Mapping[str, Tensor], name: str, source: str) -> Tensor:
    if name not in state:
        raise CheckpointError(f"{source} lacks {name}, so it is no complete generator; copy the file again.")
    return state[name]


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number that the pattern's group takes among the names."""
    found = [int(match[1]) for name in state if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def _stack_sizes(state: Mapping[str, Tensor], source: str, num_heads: int | None) -> dict[str, Any]:
    width = state["model.pe"].shape[2]
    if layers := _count(state, r"model\.mamba_forward\.(\d+)\."):
        first, last = "model.mamba_forward.0.", f"model.mamba_forward.{layers - 1}."
        d_inner = _need(state, f"{first}norm.weight", source).shape[0]
        conv = _need(state, f"{first}conv1d.weight", source).shape
        post = _need(state, f"{last}out_proj.weight", source).shape[0]
        return {
            "stack": "mamba",
            "num_layers": layers,
            "expand": d_inner // width,
            "headdim": d_inner // _need(state, f"{first}A_log", source).shape[0],
            "d_state": (conv[0] - d_inner) // 2,
            "d_conv": conv[2],
            "post_d_model": post if post != width else None,
        }
    if layers := _count(state, r"model\.lstm_forward\.weight_ih_l(\d+)"):
        return {"stack": "lstm", "num_layers": layers}
    if layers := _count(state, r"model\.transformer_forward\.layers\.(\d+)\."):
        first = "model.transformer_forward.layers.0."
        inner = _need(state, f"{first}0.to_qkv.weight", source).shape[0] // 3
        heads = num_heads or 8
        if inner % heads:
            raise CheckpointError(f"{source}: {heads} heads do not divide the attention's width of {inner}.")
        return {
            "stack": "transformer",
            "num_layers": layers,
            "num_heads": heads,
            "head_size": inner // heads,
            "feedforward": _need(state, f"{first}1.net.1.weight", source).shape[0],
            "attention": "released",
        }
    if layers := _count(state, r"model\.gmlp_forward\.(\d+)\."):
        wide = _need(state, "model.gmlp_forward.0.proj_1.weight", source).shape[0]
        return {"stack": "gmlp", "num_layers": layers, "expand": wide // width}
    raise CheckpointError(f"{source} holds none of the known stacks (mamba, lstm, transformer, gmlp) under model.*.")


def _condition_sizes(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    if "get_condition.0.weight" in state:
        d_condition, size = state["get_condition.0.weight"].shape
        kind = "full" if "to_condition_conv.0.weight" in state else "gated"
        return {"condition": kind, "condition_size": size, "d_condition": d_condition}
    size = _need(state, "to_condition.weight", source).shape[1]
    return {"condition": "linear", "condition_size": size} if size > 1 else {"condition": "none"}


def _denoiser_sizes(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    convolutions = [
        _need(state, f"{NET}{part}.{index}.0.weight", source)
        for part in ("encoder_list", "decoder_list")
        for index in range(_count(state, rf"{re.escape(NET + part)}\.(\d+)\."))
    ]
    if not convolutions:
        raise CheckpointError(f"{source} lacks the convolutions {NET}encoder_list.*; copy the file again.")
    return {
        "dim_per_token": _need(state, f"{NET}condi_embedder.weight", source).shape[0],
        "channels": (convolutions[0].shape[1], *(weight.shape[0] for weight in convolutions)),
        "kernel_size": convolutions[0].shape[2],
    }


def _diffusion_sizes(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The schedule from its table, which must be the linear one; nothing if the file has no table."""
    beta_T = state.get("criteria.diffusion_trainer.beta_t", state.get("criteria.diffusion_sampler.beta_t"))
    if beta_T is None:
        return {}
    # six digits undo the rounding to float32: 1e-4 is stored as 0.0000999999975
    beta = (float(f"{float(beta_T[0]):.6g}"), float(f"{float(beta_T[-1]):.6g}"))
    steps = len(beta_T)
    if not torch.allclose(beta_T.float(), linear_tables(*beta, steps).beta_T, rtol=1e-4, atol=0):
        raise CheckpointError(f"{source}: its noise schedule is not linear from {beta[0]} to {beta[1]}.")
    return {"beta": beta, "diffusion_steps": steps}
