"""The scale of decoded parameters.

Source: GHN-3 (rule ``fan_in``), LoGAH's language models (rule ``unit_std``); golden case ``normalize``.
"""

import torch
from torch import Tensor

from logah.tiling import Shape

MIN_POSITION_WIDTH = 11  # in the released rule a leading 1 and a third size from here on mean a table of positions
EPSILON = 1e-7


def is_position_table(shape: Shape) -> bool:
    """Whether the rules leave a tensor of this shape alone."""
    return len(shape) == 3 and shape[0] == 1 or len(shape) == 4 and shape[0] == 1 and shape[2] >= MIN_POSITION_WIDTH


def fan_in_scale(shape: Shape) -> float:
    """``sqrt(beta / fan in)``; beta is 2, but 1 for depth-wise kernels and kernels lower than wide.

    Source: Kaiming scale as GHN-3 uses it; 1 for position tables. Conv1D of transformers stores (in, out), so what is
    called fan in here is its fan out.
    """
    if is_position_table(shape):
        return 1.0
    flat = len(shape) > 2 and (shape[1] == 1 or (len(shape) > 3 and shape[2] < shape[3]))
    beta = 1.0 if flat else 2.0
    count = 1
    for size in shape[1:]:
        count *= size
    return (beta / count) ** 0.5


def normalise_vector(p: Tensor, *, is_weight: bool) -> Tensor:
    """Scales of norms into (0, 2), biases into (-1, 1)."""
    return 2 * torch.sigmoid(0.5 * p) if is_weight else torch.tanh(0.2 * p)


def normalise(p: Tensor, rule: str, *, is_weight: bool = True, initializer_range: float = 0.02) -> Tensor:
    """One parameter on the scale of ``rule`` (``fan_in``, ``unit_std`` or ``none``)."""
    if rule == "none":
        return p
    if p.dim() == 1:
        return normalise_vector(p, is_weight=is_weight)
    shape = tuple(p.shape)
    if rule == "fan_in":
        return p * fan_in_scale(shape)
    return p / (p.std() + EPSILON) * initializer_range
