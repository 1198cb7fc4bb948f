"""Initialisations that predictions are compared with: mimetic attention, and parts of a larger trained network.

Dimensions: d width of the residual stream, H heads, G key-value heads, k width of a head.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from common.seeding import generator
from logah.subcloning import subclone

__all__ = ["AttentionMaps", "attention_maps", "mimetic_init", "subclone"]

POSITION_NAMES = ("pos_embedding", "pos_embed", "wpe.weight")
POSITION_STD = 0.02  # usual deviation of learned tables


@dataclass(frozen=True)
class AttentionMaps:
    """The four maps of one attention as (inputs, outputs) views of its parameters, so that ``x @ query`` is a query.

    Attributes:
        query_dq, key_dv, value_dv: ``(d, H k)``, ``(d, G k)``, ``(d, G k)``.
        output_qd: ``(H k, d)``.
    """

    name: str
    query_dq: Tensor
    key_dv: Tensor
    value_dv: Tensor
    output_qd: Tensor
    num_heads: int
    num_key_value_heads: int


@torch.no_grad()
def mimetic_init(
    model: nn.Module,
    *,
    seed: int,
    alpha_qk: float = 0.7,
    beta_qk: float = 0.7,
    alpha_vo: float = 0.4,
    beta_vo: float = 0.4,
    positions: bool = True,
) -> dict[str, object]:
    """Gives every attention of ``model`` the structure of trained ones, in place; all else keeps its values.

    Products of query and key maps become alpha Z + beta I, those of value and output maps alpha Z - beta I, with Z
    Gaussian of deviation d^-1/2. Each product is factored by its leading singular vectors; heads that share keys and
    values get the query and output maps that fit the shared ones.

    Args:
        model: real tensors; attention of torchvision, timm, GPT-2 or Llama.
        positions: learned tables of positions become sinusoids.

    Returns: number of attentions and position tables changed.

    Raises: ConfigError for a model without an attention of a known kind.

    Source: Trockman and Kolter, Mimetic Initialization of Self-Attention Layers (2023), with its values for vision
    transformers; sharing of keys and values is ours.
    """
    found = list(attention_maps(model))
    if not found:
        raise ConfigError(
            f"inits: mimetic changes attention, and {type(model).__name__} has none of a known kind; use random."
        )
    for number, maps in enumerate(found):
        rng = generator(seed, "mimetic", number)
        _set_query_key(maps, alpha_qk, beta_qk, rng)
        _set_value_output(maps, alpha_vo, beta_vo, rng)
    tables = 0
    for name, parameter in model.named_parameters():
        if positions and name.endswith(POSITION_NAMES):
            table_TC = sinusoids(parameter.shape[-2], parameter.shape[-1])
            parameter.copy_((table_TC * POSITION_STD / table_TC.std()).view(parameter.shape))
            tables += 1
    return {"attentions": len(found), "position_tables": tables}


def attention_maps(model: nn.Module) -> Iterator[AttentionMaps]:
    """Every attention of a known kind in ``model``, as views of its parameters."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            maps = module.in_proj_weight.data.T.chunk(3, dim=1)
            heads = (module.num_heads, module.num_heads)
            yield AttentionMaps(name, *maps, module.out_proj.weight.data.T, *heads)
        elif hasattr(module, "c_attn") and hasattr(module, "c_proj") and not getattr(module, "is_cross_attention", 0):
            maps = module.c_attn.weight.data.chunk(3, dim=1)  # Conv1D stores inputs first
            yield AttentionMaps(name, *maps, module.c_proj.weight.data, module.num_heads, module.num_heads)
        elif hasattr(module, "q_proj") and hasattr(module, "o_proj"):
            linear = [getattr(module, f"{part}_proj").weight.data.T for part in "qkvo"]
            heads = (linear[0].shape[1] // module.head_dim, linear[1].shape[1] // module.head_dim)
            yield AttentionMaps(name, *linear, *heads)
        elif isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "proj"):
            maps = module.qkv.weight.data.T.chunk(3, dim=1)
            yield AttentionMaps(name, *maps, module.proj.weight.data.T, module.num_heads, module.num_heads)


def _set_query_key(maps: AttentionMaps, alpha: float, beta: float, rng: torch.Generator) -> None:
    d, width = maps.query_dq.shape[0], maps.query_dq.shape[1] // maps.num_heads
    shared = maps.num_heads // maps.num_key_value_heads
    for group in range(maps.num_key_value_heads):
        products = [alpha * _gaussian(d, rng) + beta * torch.eye(d) for _ in range(shared)]
        left_dk, size_k, right_dk = _leading(products[0], width)
        _write(maps.key_dv, group * width, right_dk * size_k.sqrt())
        for number, product_dd in enumerate(products):
            query_dk = product_dd @ right_dk / size_k.sqrt()  # for the first: its left vectors times sqrt(size)
            _write(maps.query_dq, (group * shared + number) * width, query_dk)


def _set_value_output(maps: AttentionMaps, alpha: float, beta: float, rng: torch.Generator) -> None:
    d, total = maps.value_dv.shape
    width, shared = total // maps.num_key_value_heads, maps.num_heads // maps.num_key_value_heads
    left_dv, size_v, right_dv = _leading(alpha * _gaussian(d, rng) - beta * torch.eye(d), total)
    _write(maps.value_dv, 0, left_dv * size_v.sqrt())
    rows_vd = (right_dv * size_v.sqrt()).T / shared  # several heads add up what they read of the same values
    for head in range(maps.num_heads):
        group = head // shared
        part_kd = rows_vd[group * width : (group + 1) * width]
        maps.output_qd[head * width : head * width + len(part_kd)].copy_(part_kd)


def _leading(matrix_dd: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors, values and right vectors of the ``count`` largest singular values, ``(d, count)`` each.

    A map wider than d has rank d; its remaining columns are zero.
    """
    left, size, right = torch.linalg.svd(matrix_dd)
    kept = min(count, len(size))
    return left[:, :kept], size[:kept], right[:kept].T


def _write(map_dn: Tensor, start: int, columns_dk: Tensor) -> None:
    map_dn[:, start : start + columns_dk.shape[1]].copy_(columns_dk)


def _gaussian(d: int, rng: torch.Generator) -> Tensor:
    return torch.randn(d, d, generator=rng) / math.sqrt(d)


def sinusoids(length: int, width: int) -> Tensor:
    """``(T, C)``: sines in the even columns, cosines in the odd ones.

    Source: Vaswani et al. (2017), section 3.5.
    """
    rates = torch.exp(-math.log(10_000.0) * torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]
