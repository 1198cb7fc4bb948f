"""Parameters of the exact size of their target by ``LowRankV2Decoder``; nothing is tiled, rounded or divided out.

Dimensions: R nodes with targets of one shape, t width of the trunk, r rank.
"""

import torch
from torch import Tensor

from logah.assignment import BIAS_ROW, Target, TargetPlan
from logah.decoder_v2 import LowRankV2Decoder, parts_of, role_of
from logah.model_config import HyperNetworkConfig
from logah.normalisation import fan_in_scale, normalise_vector
from logah.row_chunks import FactoredMatrix

# Of embeddings and position tables before the predicted scale. A tenth of it hid the positions behind the patches:
# freshly predicted digit networks reached 25 % accuracy in 400 steps instead of 60 % (one run each).
EMBEDDING_STD = 1.0
VECTOR_STD = 1.0  # of scales and shifts of norms, before they are squashed


def usual_std(target: Target, plan: TargetPlan, config: HyperNetworkConfig) -> float:
    """Deviation of a tensor of this shape and place; what the node predicts is relative to it."""
    role = role_of(target)  # tied embeddings also give the scores, whose size is that of other matrices
    if role in ("embedding", "position") or target.shape[0] == 1:
        return EMBEDDING_STD
    if config.rule != "unit_std":
        return fan_in_scale(target.shape)
    wanted = config.initializer_range if plan.initializer_range is None else plan.initializer_range
    if config.residual_scale and target.residual and plan.num_blocks:
        wanted /= (2 * plan.num_blocks) ** 0.5
    return wanted


def factored(
    decoder: LowRankV2Decoder, trunk_1t: Tensor, target: Target, plan: TargetPlan, config: HyperNetworkConfig
) -> FactoredMatrix | None:
    """The target as factors of its exact size, None if it is not a matrix.

    Query, key and value of a fused matrix are products of their own: its factors are their block matrices, of rank 3r.
    """
    if role_of(target) == "vector" or len(target.shape) != 2:
        return None
    rows, columns = target.shape
    down, across = parts_of(target)
    pairs = [(a[0], b[0]) for a, b in _pairs(decoder, trunk_1t, target, (rows // down, columns // across))]
    if down > 1:
        a_nr, b_mr = torch.block_diag(*[a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)
    else:
        a_nr, b_mr = torch.cat([a for a, _ in pairs], dim=1), torch.block_diag(*[b for _, b in pairs])
    return FactoredMatrix(a_nr, b_mr.T * usual_std(target, plan, config), rows, columns)


def alike(
    decoder: LowRankV2Decoder, trunk_Rt: Tensor, target: Target, plan: TargetPlan, config: HyperNetworkConfig
) -> Tensor:
    """Parameters of R nodes whose targets are alike in shape, role, row and ``role_of``: ``(R, *shape)``."""
    if role_of(target) == "vector":
        values_Rn = decoder.vector(decoder.conditioned(trunk_Rt, "vector"), target.shape[0], target.row)
        return normalise_vector(values_Rn * VECTOR_STD, is_weight=target.row != BIAS_ROW)
    rows, columns = matrix_size(target.shape)
    down, across = parts_of(target)
    products = [a @ b.transpose(1, 2) for a, b in _pairs(decoder, trunk_Rt, target, (rows // down, columns // across))]
    values = torch.cat(products, dim=1 if down > 1 else 2) * usual_std(target, plan, config)
    if len(target.shape) == 4:
        outputs, inputs, height, width = target.shape
        return values.view(-1, outputs, height, inputs, width).permute(0, 1, 3, 2, 4)
    return values.reshape(-1, *target.shape)


def matrix_size(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns that a tensor is decoded as: position tables (1, T, C) as T x C, class token's row included."""
    if len(shape) == 4:
        return shape[0] * shape[2], shape[1] * shape[3]
    if len(shape) == 3:
        return shape[0] * shape[1], shape[2]
    return shape


def _pairs(
    decoder: LowRankV2Decoder, trunk_Rt: Tensor, target: Target, size: tuple[int, int]
) -> list[tuple[Tensor, Tensor]]:
    """Factors of every part of the target."""
    role, fused = role_of(target), parts_of(target) != (1, 1)
    parts = range(max(parts_of(target))) if fused else [None]
    return [decoder.factors(decoder.conditioned(trunk_Rt, role, part), *size) for part in parts]
