"""Optimizer groups of a parametrised model: muP's learning rates and weight decays for Adam.

Source: specification 3.5; order of groups as in the mup package, so that its optimizer states can be read.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

from torch import nn

from common.config import require_choice
from mup_dit.parametrization import Scaling

DECAY_RULES = ("scaled", "independent")


def mup_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    scalings: Mapping[str, Scaling] | None,
    weight_decay: float,
    *,
    decay_rule: Literal["scaled", "independent"] = "scaled",
    eps: float | None = None,
) -> list[dict]:
    """One group per learning-rate multiplier of the matrices, in order of first appearance, then all other tensors.

    Args:
        parameters: as ``named_parameters()`` gives them; all in one group without a table.
        weight_decay: of base width. ``scaled``: times m for matrices, so that ``lr * decay`` does not depend on width;
            ``independent``: the same number for all.
        eps: Adam's, given to divide it by m for matrices, whose gradients shrink with width (off in the reference).

    Returns: groups with ``params``, ``names``, ``lr_scale`` and ``weight_decay``, and ``eps`` if one was given.
    """
    require_choice("optim.decay_rule", decay_rule, DECAY_RULES)
    matrices: dict[float, dict] = {}
    vectors: dict = {"params": [], "names": [], "lr_scale": 1.0, "weight_decay": weight_decay}
    if eps is not None:
        vectors["eps"] = eps
    for name, parameter in parameters:
        row = (scalings or {}).get(name)
        group = vectors
        if row is not None and row.ninf == 2:
            decay = weight_decay * (row.weight_decay_mult if decay_rule == "scaled" else 1.0)
            new = {"params": [], "names": [], "lr_scale": row.lr_mult, "weight_decay": decay}
            if eps is not None:
                new["eps"] = eps * row.lr_mult
            group = matrices.setdefault(row.lr_mult, new)
        group["params"].append(parameter)
        group["names"].append(name)
    return [*matrices.values(), vectors]
