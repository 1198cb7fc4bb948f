"""All parameters of one network, one after the other: what filling a module and streaming to disk have in common.

Nodes whose parameters are alike in shape share the reading of their factors: the decoder's last maps are the largest
matrices that are touched, and read once for several nodes they cost a third of the time (LoGAH-Large, width 1280). Only
the factors of these few nodes, or their tensors where those are small, are held. The batches depend on the network and
the hypernetwork alone, so both users get the same bits.

Dimensions: G nodes read together, n rows and m columns of a matrix, r rank.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from logah.assignment import Target, TargetPlan
from logah.decoder_v2 import parts_of, role_of
from logah.decoding import (
    MATRICES,
    Group,
    Start,
    check_size,
    decode_factored,
    decode_groups,
    matrix_scale,
    reads_of,
)
from logah.hypernetwork import HyperNetwork
from logah.row_chunks import FactoredMatrix

MOST_NODES = 16
MOST_VALUES = 1 << 23
"""Most nodes, and most values of their factors or tensors, that are held at a time: 32 MiB in float32."""


@torch.no_grad()
def decode_each(
    hypernetwork: HyperNetwork, start: Start, plan: TargetPlan, *, generator: torch.Generator | None = None
) -> Iterator[tuple[Target, FactoredMatrix | Tensor]]:
    """Every target of ``plan`` once, as factors with its scale in them where it is a matrix of a low-rank decoder.

    Args:
        start: ``decoding.prepare`` of the graph's nodes.
        generator: of class tokens' rows, if ``class_token_noise`` is not zero.

    Raises: ConfigError for a target that the decoder is too small for, before the first is decoded.
    """
    for target in plan.targets:
        check_size(hypernetwork, target)
    for alike in _alike(plan):
        for members in _batches(hypernetwork, alike):
            rows = start.rows([target.node for target in members])
            if not _has_factors(hypernetwork, members[0]):
                generators = None if generator is None else [generator] * len(members)
                values = decode_groups(hypernetwork, [Group(members[0], plan, rows, generators)])[0]
                yield from zip(members, values.unbind(), strict=True)
            elif hypernetwork.config.decoder == "lowrank":
                yield from zip(members, _matrices(hypernetwork, rows, plan, members), strict=True)
            else:
                for number, target in enumerate(members):
                    yield target, decode_factored(hypernetwork, rows.rows([number]), target, plan)


def _alike(plan: TargetPlan) -> list[list[Target]]:
    """Targets that one call can decode, in the order of their first nodes."""
    groups: dict[tuple, list[Target]] = {}
    for target in plan.targets:
        key = (
            target.shape,
            target.role,
            target.row,
            target.embedding,
            target.residual,
            role_of(target),
            parts_of(target),
        )
        groups.setdefault(key, []).append(target)
    return list(groups.values())


def _batches(hypernetwork: HyperNetwork, alike: list[Target]) -> Iterator[list[Target]]:
    """``alike`` in parts that keep to the limits."""
    target = alike[0]
    values = math.prod(target.shape)
    if _has_factors(hypernetwork, target) or len(target.shape) == 1:
        values = sum(target.shape) * hypernetwork.config.lora_r
    size = max(1, min(MOST_NODES, MOST_VALUES // values))
    for first in range(0, len(alike), size):
        yield alike[first : first + size]


def _has_factors(hypernetwork: HyperNetwork, target: Target) -> bool:
    """Whether ``decode_factored`` gives factors: decided without reading any."""
    decoder = hypernetwork.config.decoder
    if decoder == "lowrank_v2":
        return role_of(target) != "vector" and len(target.shape) == 2
    return decoder == "lowrank" and target.role in MATRICES and len(target.shape) == 2


def _matrices(
    hypernetwork: HyperNetwork, rows: Start, plan: TargetPlan, members: list[Target]
) -> Iterator[FactoredMatrix]:
    reads = reads_of(hypernetwork, members[0])
    a_Gnr, b_Gmr = hypernetwork.decoder.read_many([rows.trunk_Rt] * 2, reads)
    for target, a_nr, b_mr in zip(members, a_Gnr, b_Gmr, strict=True):
        matrix = FactoredMatrix(a_nr, b_mr.T, *target.shape)
        scale = matrix_scale(hypernetwork, target, plan, matrix.std)
        yield matrix if scale is None else matrix.scaled(scale)
