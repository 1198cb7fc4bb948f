"""Corrupted sequences: tokens replaced by the mask, with every random number given from outside.

Dimensions: B batch, L sequence.
"""

import torch
from torch import Tensor


def mask_bernoulli(x_BL: Tensor, probability_B: Tensor, uniform_BL: Tensor, mask_id: int) -> Tensor:
    """z_BL: each token is the mask where its uniform is below its row's masking probability, else unchanged."""
    return torch.where(uniform_BL < probability_B[:, None], mask_id, x_BL)


def mask_count(x_BL: Tensor, count_B: Tensor, permutation_BL: Tensor, mask_id: int) -> Tensor:
    """z_BL with exactly ``count_B`` masked tokens per row.

    Args:
        count_B: masked positions per row, 0..L.
        permutation_BL: a permutation of 0..L-1 per row; position i is masked when its entry is below the count, so a
            uniformly random permutation masks a uniformly random subset.
    """
    return torch.where(permutation_BL < count_B[:, None], mask_id, x_BL)


def random_permutations(size: int, length: int, *, generator: torch.Generator) -> Tensor:
    """Uniformly random permutations of 0..length-1, one per row: int64 ``(size, length)``."""
    # float64: two equal uniforms, which a sort would order by index, are out of reach.
    return torch.rand(size, length, generator=generator, dtype=torch.float64).argsort(dim=1)
