"""Parameters of the exact size of their target, from the embeddings of their nodes.

Dimensions: R nodes with targets of one shape, d width, t width of what all decoders start from.

Source: LoGAH, section 3, and GHN-3; only the rows of the factors that reach the target are computed, which changes no
number (golden cases ``predict_*``).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import ConfigError
from logah import decoding_v2
from logah.assignment import BIAS_ROW, RESIDUAL_NAMES, Target, TargetPlan, rounded
from logah.decoder_lowrank import A, B, LowRankDecoder, Read, Request, as_kernel
from logah.decoder_v2 import LowRankV2Decoder
from logah.hypernetwork import HyperNetwork
from logah.normalisation import EPSILON, fan_in_scale, normalise_vector
from logah.row_chunks import FactoredMatrix
from logah.tiling import grid_side, position_table, repeat_to, resize_kernel, tile

MATRICES = ("matrix", "class_weight")
VECTORS = ("vector", "class_bias")


@dataclass(frozen=True)
class Start:
    """What the decoders start from.

    Attributes:
        x_Rd: embeddings of the nodes, float32.
        trunk_Rt: a low-rank decoder's trunk of them, one pass for all nodes; None of the dense decoder.
    """

    x_Rd: Tensor
    trunk_Rt: Tensor | None

    def rows(self, index: Sequence[int]) -> "Start":
        """Of these nodes."""
        trunk = None if self.trunk_Rt is None else self.trunk_Rt[index]
        return Start(self.x_Rd[index], trunk)


def prepare(hypernetwork: HyperNetwork, x_Rd: Tensor) -> Start:
    """The start of all nodes of one or several graphs."""
    x_Rd = x_Rd.float()
    lowrank = isinstance(hypernetwork.decoder, LowRankDecoder | LowRankV2Decoder)
    return Start(x_Rd, hypernetwork.decoder.trunk(x_Rd) if lowrank else None)


def check_size(hypernetwork: HyperNetwork, target: Target) -> None:
    """Raises ConfigError if K rows of a factor are too few for the target."""
    config = hypernetwork.config
    if config.decoder != "lowrank":
        return
    key = target.key(config.max_shape)
    if target.role in VECTORS:
        needed = 0 if config.use_1d_decoder else 2 * key[0]
    elif target.role == "tensor3":
        needed = 0 if config.use_1d_decoder else math.prod(key)
    else:
        outputs, inputs, height, width = request_of(hypernetwork, target)
        needed = max(outputs * height, inputs * width)
    if needed > config.max_ck_lora:
        raise ConfigError(
            f"model.max_ck_lora={config.max_ck_lora} is too small for {target.name} of shape {target.shape}, which "
            f"reads {needed} rows of a factor; use a hypernetwork with model.max_ck_lora of at least {needed}, or a "
            "smaller model.max_shape, over which wider layers are tiled."
        )


# ------------------------------------------------------------------------------------------- matrices by their factors


def decode_factored(
    hypernetwork: HyperNetwork, start: Start, target: Target, plan: TargetPlan
) -> FactoredMatrix | None:
    """The target as factors with its scale in them; None if it is not a matrix of a low-rank decoder.

    Args:
        start: the target's row of ``prepare``, R = 1.
    """
    config = hypernetwork.config
    if config.decoder == "lowrank_v2":
        return decoding_v2.factored(hypernetwork.decoder, start.trunk_Rt, target, plan, config)
    if config.decoder != "lowrank" or target.role not in MATRICES or len(target.shape) != 2:
        return None
    check_size(hypernetwork, target)
    a, b = (hypernetwork.decoder.read(start.trunk_Rt, read)[0] for read in reads_of(hypernetwork, target))
    matrix = FactoredMatrix(a, b.T, *target.shape)
    scale = matrix_scale(hypernetwork, target, plan, matrix.std)
    return matrix if scale is None else matrix.scaled(scale)


def matrix_scale(
    hypernetwork: HyperNetwork, target: Target, plan: TargetPlan, std: Callable[[], Tensor]
) -> Tensor | float | None:
    """What a tensor of two or more dimensions is multiplied by; None: nothing.

    Args:
        std: gives the deviation of all its entries, one per tensor, for the rule that divides by it.
    """
    rule = hypernetwork.config.rule
    if rule == "none" or target.embedding:
        return None
    if rule == "fan_in":
        return fan_in_scale(target.shape)
    wanted = hypernetwork.config.initializer_range if plan.initializer_range is None else plan.initializer_range
    if hypernetwork.config.residual_scale and target.name.endswith(RESIDUAL_NAMES) and plan.num_blocks:
        wanted /= (2 * plan.num_blocks) ** 0.5
    return wanted / (std() + EPSILON)


# ------------------------------------------------------------------------------------------- one target


def decode_target(
    hypernetwork: HyperNetwork,
    start: Start,
    target: Target,
    plan: TargetPlan,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One parameter; the same bits whether it fills a module or goes to a file.

    Args:
        start: the target's row of ``prepare``, R = 1.
        generator: of the class token's row, if ``class_token_noise`` is not zero.
    """
    factored = decode_factored(hypernetwork, start, target, plan)
    if factored is not None:
        return factored.materialise()
    generators = None if generator is None else [generator]
    return decode_groups(hypernetwork, [Group(target, plan, start, generators)])[0][0]


# ------------------------------------------------------------------------------------------- many targets of one shape


@dataclass(frozen=True)
class Group:
    """Targets that are decoded together.

    Attributes:
        target: one of them; the others are alike in shape, role, row and whatever their scale depends on.
        start: of their nodes, R rows.
        generators: of the class tokens' rows, one per target, if ``class_token_noise`` is not zero.
    """

    target: Target
    plan: TargetPlan
    start: Start
    generators: Sequence[torch.Generator] | None = None


def decode_groups(hypernetwork: HyperNetwork, groups: Sequence[Group]) -> list[Tensor]:
    """``(R, *shape)`` of each group, through which gradients reach the hypernetwork."""
    config = hypernetwork.config
    if config.decoder == "lowrank_v2":
        return [
            decoding_v2.alike(hypernetwork.decoder, group.start.trunk_Rt, group.target, group.plan, config)
            for group in groups
        ]
    for group in groups:
        check_size(hypernetwork, group.target)
    reads = [reads_of(hypernetwork, group.target) for group in groups]
    wanted = [(group.start.trunk_Rt, read) for group, pair in zip(groups, reads, strict=True) for read in pair]
    factors = iter(())
    if wanted:
        factors = iter(hypernetwork.decoder.read_many([trunk for trunk, _ in wanted], [read for _, read in wanted]))
    decoded = []
    for group, pair in zip(groups, reads, strict=True):
        product = next(factors) @ next(factors).transpose(1, 2) if pair else None
        decoded.append(finish(hypernetwork, group, product))
    return decoded


def reads_of(hypernetwork: HyperNetwork, target: Target) -> tuple[Read, ...]:
    """Rows of A and of B that the target is made from; none if another decoder makes it."""
    config, shape = hypernetwork.config, target.shape
    if config.decoder != "lowrank" or config.use_1d_decoder and target.role in (*VECTORS, "tensor3"):
        return ()
    if target.role in VECTORS:
        first = target.row * rounded(shape[0], config.max_shape[0])
        return Read(A, first, first + min(shape[0], config.max_shape[0])), Read(B, 0, 1)
    if target.role == "tensor3":
        return Read(A, 0, math.prod(target.key(config.max_shape))), Read(B, 0, 1)
    outputs, inputs, height, width = request_of(hypernetwork, target)
    return Read(A, 0, outputs * height), Read(B, 0, inputs * width)


def request_of(hypernetwork: HyperNetwork, target: Target) -> Request:
    """What is decoded of a target of two or more dimensions, before it is tiled."""
    shape, most = target.shape, hypernetwork.config.max_shape
    if target.role == "position":
        side = grid_side(shape[1])[0]
        return 1, shape[2], side, side
    height, width = shape[2:] if len(shape) == 4 else (1, 1)
    return min(shape[0], most[0]), min(shape[1], most[1]), height, width


def finish(hypernetwork: HyperNetwork, group: Group, product: Tensor | None) -> Tensor:
    """``(R, *shape)``: tiled, in the target's form and on its scale.

    Args:
        product: of the factors of each target; None: another decoder makes them.
    """
    target = group.target
    if target.role in VECTORS:
        values = _vectors(hypernetwork, group, product)
        if hypernetwork.config.rule == "none":
            return values
        return normalise_vector(values, is_weight=target.row != BIAS_ROW)
    values = _tensors(hypernetwork, group, product)

    def std() -> Tensor:
        return values.flatten(1).std(dim=1).view(-1, *[1] * len(target.shape))

    scale = matrix_scale(hypernetwork, target, group.plan, std)
    return values if scale is None else values * scale


def _vectors(hypernetwork: HyperNetwork, group: Group, product: Tensor | None) -> Tensor:
    """``(R, n)``: row ``target.row`` of the pair (weight, bias) that a node gives."""
    target = group.target
    if product is not None:
        values = product[..., 0]
    else:
        both = hypernetwork.decoder_1d(group.start.x_Rd)
        if target.role == "class_bias":
            both = hypernetwork.bias_class(both)
        values = both[:, target.row]
    return repeat_to(values, (len(values), target.shape[0]))


def _tensors(hypernetwork: HyperNetwork, group: Group, product: Tensor | None) -> Tensor:
    """``(R, *shape)`` before its scale."""
    target, shape = group.target, group.target.shape
    if target.role == "tensor3":
        return _tensor3(hypernetwork, group, product)
    request = request_of(hypernetwork, target)
    if target.role in MATRICES:
        if product is None:
            kind = "class" if target.role == "class_weight" else "4d"
            product = hypernetwork.decoder(group.start.x_Rd, request, kind)
            product = product if kind == "class" else product[..., 0, 0]
        return repeat_to(product, (len(product), *shape[:2])).reshape(-1, *shape)
    if product is None:
        kernel = hypernetwork.decoder(group.start.x_Rd, request)
    else:
        kernel = as_kernel(product, request)
    if target.role == "position":
        grids = repeat_to(kernel, (len(kernel), *request))
        return torch.stack(
            [
                position_table(grid, shape[1], rows)
                for grid, rows in zip(grids, _front(hypernetwork, group), strict=True)
            ]
        )
    if kernel.shape[3:] != shape[2:]:
        kernel = resize_kernel(kernel.flatten(0, 1), shape[2:]).view(*kernel.shape[:3], *shape[2:])
    return repeat_to(kernel, (len(kernel), *shape))


def _tensor3(hypernetwork: HyperNetwork, group: Group, product: Tensor | None) -> Tensor:
    """Tensors of three dimensions that are no position table are decoded as one vector."""
    target = group.target
    sizes = target.key(hypernetwork.config.max_shape)
    flat = hypernetwork.decoder_1d(group.start.x_Rd) if product is None else product
    flat = repeat_to(flat.flatten(1), (len(flat), math.prod(sizes)))
    return torch.stack([tile(one.view(sizes), target.shape) for one in flat])


def _front(hypernetwork: HyperNetwork, group: Group) -> Sequence[Tensor | None]:
    """Rows before the grid of each position table: None for zero ones."""
    noise, shape = hypernetwork.config.class_token_noise, group.target.shape
    count, width, rows = grid_side(shape[1])[1], shape[2], len(group.start.x_Rd)
    if noise == 0 or count == 0:
        return [None] * rows
    if group.generators is None:
        raise ConfigError(
            f"model.class_token_noise={noise} draws the class token's row; give the generator that it comes from, or "
            "set it to 0."
        )
    return [noise * torch.randn(count, width, generator=generator) for generator in group.generators]
