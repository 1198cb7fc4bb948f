"""What may follow a prediction: noise that breaks symmetries, orthogonal weights, fresh residual weights.

Every function works on one tensor at a time, from a generator named after the tensor, so a prediction that is streamed
to disk and one that is made in memory get the same numbers.

Dimensions: R rows (the larger) and C columns of a weight as a matrix.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from common.seeding import generator

NOISE_BETA = 1e-5
"""Strength that GHN-3's finetuning uses."""

BLOCK_ROWS = 4096

RESIDUAL_ENDS = (
    "c_proj.weight",  # GPT-2: attention and MLP
    "o_proj.weight",
    "down_proj.weight",
    "self_attention.out_proj.weight",  # torchvision's ViT
    "mlp.3.weight",
)
"""How the names of weights end whose output is added to the residual stream."""


def as_matrix(weight: Tensor) -> tuple[Tensor, bool]:
    """``weight`` as (R, C) with R >= C, and whether that took a transposition; the rows of a weight are its outputs."""
    matrix = weight.reshape(weight.shape[0], -1)
    is_wide = matrix.shape[0] < matrix.shape[1]
    return (matrix.T, True) if is_wide else (matrix, False)


def correlation_spread(weight: Tensor) -> float:
    """Standard deviation (unbiased) of all correlations between rows of ``weight`` as a matrix.

    With rows of mean 0 and length 1, the R x R correlations are Z Z^T; their mean and mean square need only the sum of
    the rows and the C x C matrix Z^T Z, so a vocabulary of 50257 rows costs no matrix of 2.5 billion entries.
    Rows that do not vary correlate with nothing.
    """
    matrix_RC, _ = as_matrix(weight.detach())
    entries, columns = len(matrix_RC) ** 2, matrix_RC.shape[1]
    if entries < 2:
        return 0.0
    sum_C = torch.zeros(columns, dtype=torch.float64, device=weight.device)
    product_CC = torch.zeros(columns, columns, dtype=torch.float64, device=weight.device)
    for block in matrix_RC.split(BLOCK_ROWS):  # float64 of all rows at once would be several times the weight
        z_RC = block.double()
        z_RC = z_RC - z_RC.mean(1, keepdim=True)
        lengths_R1 = z_RC.norm(dim=1, keepdim=True)
        z_RC = torch.where(lengths_R1 > 0, z_RC / lengths_R1.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        sum_C += z_RC.sum(0)
        product_CC.addmm_(z_RC.T, z_RC)
    mean = sum_C.square().sum() / entries
    mean_square = product_CC.square().sum() / entries
    variance = (mean_square - mean.square()) * entries / (entries - 1)
    return float(variance.clamp_min(0).sqrt())


def noisy(weight: Tensor, noise: Tensor, beta: float = NOISE_BETA) -> Tensor:
    """``weight`` plus standard normal ``noise`` times ``beta`` times the spread of its rows' correlations.

    Rows that were predicted alike stay alike in training; the more alike, the more noise they get.

    Source: initialisation of GHN-2 (Knyazev et al., 2021), kept by GHN-3.
    """
    return weight + (beta * correlation_spread(weight)) * noise.to(weight)


def orthogonal(weight: Tensor) -> Tensor:
    """Orthonormal columns (rows, if there are fewer) that span those of ``weight``: Q of its QR, R's diagonal positive.

    Source: option of GHN-2's initialisation.
    """
    matrix_RC, is_wide = as_matrix(weight)
    q_RC, r_CC = torch.linalg.qr(matrix_RC.float())
    q_RC = q_RC * r_CC.diagonal().sign()
    return (q_RC.T if is_wide else q_RC).reshape(weight.shape).to(weight.dtype)


def is_residual_weight(name: str) -> bool:
    """Whether the parameter ``name`` writes to the residual stream of a transformer."""
    return name.endswith(RESIDUAL_ENDS)


def fresh_residual(name: str, like: Tensor, num_layers: int, *, seed: int, initializer_range: float = 0.02) -> Tensor:
    """N(0, initializer_range^2 / (2 num_layers)) in place of a predicted residual weight.

    Source: GPT-2's initialisation, with which LoGAH's training script overwrites every predicted ``c_proj.weight``.
    """
    drawn = torch.randn(like.shape, generator=generator(seed, f"residual {name}"))
    return (drawn * (initializer_range / (2 * num_layers) ** 0.5)).to(like)


def standard_noise(name: str, like: Tensor, *, seed: int) -> Tensor:
    """The noise of parameter ``name``; float32, on the CPU."""
    return torch.randn(like.shape, generator=generator(seed, f"noise {name}"))


def changed_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that noise and orthogonalisation change: of two or more dimensions, of every module but the last.

    The last module with such a weight is the head. A tied weight is listed once, under its first name, and left out
    only if all its places are the head.
    """
    places = [
        (f"{path}.weight" if path else "weight", module.weight)
        for path, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() >= 2
    ]
    found: dict[int, tuple[str, Tensor]] = {}
    for name, weight in places[:-1]:
        found.setdefault(id(weight), (name, weight))
    return dict(found.values())


@torch.no_grad()
def break_symmetry(
    model: nn.Module,
    beta: float = NOISE_BETA,
    *,
    seed: int = 0,
    orthogonalise: bool = False,
    draw: Callable[[str, Tensor], Tensor] | None = None,
) -> list[str]:
    """Adds noise to ``model`` in place, and then makes the same weights orthogonal if asked to.

    Args:
        beta: 0: no noise.
        draw: standard normal noise for a parameter's name and tensor; None: ``standard_noise``.

    Returns:
        Names of the weights that changed.
    """
    weights = changed_weights(model)
    for name, weight in weights.items():
        if beta:
            noise = standard_noise(name, weight, seed=seed) if draw is None else draw(name, weight)
            weight.copy_(noisy(weight, noise, beta))
        if orthogonalise:
            weight.copy_(orthogonal(weight))
    return list(weights) if beta or orthogonalise else []


@torch.no_grad()
def reinitialise_residual(
    model: nn.Module, num_layers: int, *, seed: int = 0, initializer_range: float = 0.02
) -> list[str]:
    """Overwrites every residual weight of ``model`` in place (see ``fresh_residual``); returns their names."""
    changed = []
    for name, parameter in model.named_parameters():
        if is_residual_weight(name):
            parameter.copy_(fresh_residual(name, parameter, num_layers, seed=seed, initializer_range=initializer_range))
            changed.append(name)
    return changed


def count_layers(names: Iterable[str] | Mapping[str, object]) -> int:
    """Transformer layers of a network, from the names of its parameters: distinct prefixes of residual weights."""
    layers = set()
    for name in names:
        end = next((end for end in RESIDUAL_ENDS if name.endswith(end)), None)
        if end is not None:
            prefix = name.removesuffix(end).rstrip(".")
            layers.add(tuple(part for part in prefix.split(".") if any(letter.isdigit() for letter in part)))
    return len(layers)
