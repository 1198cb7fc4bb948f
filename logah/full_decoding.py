"""Parameters by way of whole factors at rounded sizes, as the released implementation decodes them.

The numbers are those of ``logah/decoding.py``; time and memory are what that saves. Parity and measurements use it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import ConfigError
from logah.assignment import Target
from logah.decoding import MATRICES, VECTORS, Group, check_size, finish
from logah.hypernetwork import HyperNetwork


def decode_groups_fully(hypernetwork: HyperNetwork, groups: Sequence[Group]) -> list[Tensor]:
    """``(R, *shape)`` of each group; groups of one key share a call of the decoder.

    Raises: ConfigError for other decoders than the low-rank one.
    """
    config = hypernetwork.config
    if config.decoder != "lowrank" or config.use_1d_decoder:
        raise ConfigError("training.scheme=reference measures the low-rank decoder without a decoder for vectors.")
    by_key: dict[tuple, list[int]] = {}
    for number, group in enumerate(groups):
        check_size(hypernetwork, group.target)
        by_key.setdefault(group.target.key(config.max_shape), []).append(number)
    found: dict[int, Tensor] = {}
    for key, numbers in by_key.items():
        x_Rd = torch.cat([groups[number].start.x_Rd for number in numbers])
        request, kind = _request(groups[numbers[0]].target, key)
        parts = hypernetwork.decoder.full(x_Rd, request, kind).split([len(groups[n].start.x_Rd) for n in numbers])
        for number, values in zip(numbers, parts, strict=True):
            found[number] = finish(hypernetwork, groups[number], _cut(values, groups[number].target, key))
    return [found[number] for number in range(len(groups))]


def _request(target: Target, key: tuple) -> tuple[tuple[int, int, int, int], str]:
    if target.role in VECTORS:
        return (2 * key[0], 1, 1, 1), "1d"
    if target.role == "class_weight":
        return (*key, 1, 1), "class"
    if target.role == "tensor3":
        return (key[0] * key[1] * key[2], 1, 1, 1), "1d"
    return key, "4d"


def _cut(values: Tensor, target: Target, key: tuple) -> Tensor:
    """What ``finish`` takes: the product of the factors, without what the target does not use."""
    if target.role in VECTORS:
        length = min(key[0], target.shape[0])
        return values.view(len(values), 2, key[0])[:, target.row, :length, None]
    if target.role == "tensor3":
        return values[..., None]
    if target.role in MATRICES:
        matrix = values if values.dim() == 3 else values[..., 0, 0]
        return matrix[:, : target.shape[0], : target.shape[1]]
    if target.role == "position":
        kernel = values
    else:
        kernel = values[:, : target.shape[0], : target.shape[1]]
    return kernel.permute(0, 1, 3, 2, 4).flatten(3, 4).flatten(1, 2)
