"""Mixup and CutMix of a global batch: the same images whichever process makes them.

Sample r of a batch of B is mixed with sample B - 1 - r. One share per step, drawn from (seed, step); a process makes
its rows and their partners.

Dimensions: B images of a micro-batch.

Source: mixup: Zhang et al., 2018; CutMix: Yun et al., 2019; choice between both per batch as in timm.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError
from common.seeding import derive_seed


@dataclass(frozen=True)
class Mix:
    """What one step does: the first image's share, and the box that comes from the second (CutMix)."""

    share: float
    box: tuple[int, int, int, int] | None = None  # top, bottom, left, right


def draw_mix(
    seed: int, step: int, *, mixup: float, cutmix: float, probability: float, switch: float, size: tuple[int, int]
) -> Mix | None:
    """What step ``step`` does; None: it leaves the images alone.

    Args:
        mixup, cutmix: alpha of the share's Beta(alpha, alpha) law; 0: off.
        probability: of mixing at all.
        switch: probability of CutMix where both are on.
        size: height and width in pixels.
    """
    rng = np.random.default_rng(derive_seed(seed, "mix", step))
    use, which = rng.random(2)
    if use >= probability or not (mixup or cutmix):
        return None
    cut = cutmix > 0 and (mixup == 0 or which < switch)
    share = float(rng.beta(*[cutmix if cut else mixup] * 2))
    if not cut:
        return Mix(share)
    height, width = size
    side = math.sqrt(1 - share)
    top, left = rng.integers(height), rng.integers(width)
    half_height, half_width = int(height * side) / 2, int(width * side) / 2
    top, bottom = max(math.floor(top - half_height), 0), min(math.floor(top + half_height), height)
    left, right = max(math.floor(left - half_width), 0), min(math.floor(left + half_width), width)
    # a box cut off at the border shows less of the second image than was drawn
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def apply_mix(mix: Mix | None, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``images``, ``labels``, ``other_labels`` and ``share`` (of ``labels``) of a mixed micro-batch.

    Args:
        first, second: ``images`` and ``labels`` of the rows and of their partners.
    """
    if mix is None:
        share_B = torch.ones(len(first["labels"]))
        return {**first, "other_labels": first["labels"], "share": share_B}
    if mix.box is None:
        images = torch.lerp(second["images"], first["images"], mix.share)
    else:
        top, bottom, left, right = mix.box
        images = first["images"].clone()
        images[..., top:bottom, left:right] = second["images"][..., top:bottom, left:right]
    share_B = torch.full((len(images),), mix.share)
    return {**first, "images": images, "other_labels": second["labels"], "share": share_B}


def soft_targets(
    label_B: Tensor, other_B: Tensor | None, share_B: Tensor | None, num_classes: int, smoothing: float
) -> Tensor:
    """Probability of every class, ``(B, C)``: labels mixed, then ``smoothing`` spread evenly over all classes."""
    target_BC = torch.nn.functional.one_hot(label_B, num_classes).float()
    if other_B is not None and share_B is not None:
        other_BC = torch.nn.functional.one_hot(other_B, num_classes).float()
        target_BC = torch.lerp(other_BC, target_BC, share_B[:, None].to(target_BC))
    return target_BC * (1 - smoothing) + smoothing / num_classes


def require_mix(mixup: float, cutmix: float, probability: float, switch: float) -> None:
    """Raises ConfigError for an alpha below 0 or a probability outside [0, 1]."""
    for name, value in (("mixup", mixup), ("cutmix", cutmix)):
        if not value >= 0:
            raise ConfigError(f"training.{name}={value} is the alpha of a Beta law and must be at least 0 (off).")
    for name, value in (("mix_probability", probability), ("mix_switch", switch)):
        if not 0 <= value <= 1:
            raise ConfigError(f"training.{name}={value} must lie in [0, 1].")
