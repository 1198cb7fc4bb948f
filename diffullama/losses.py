"""The training objective: weighted cross-entropy at masked positions, from logits (parity) or fused with the head.

Dimensions: B batch, L sequence, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from common.config import require_choice

LOSS_NORMS = ("tokens", "masked")


@dataclass(frozen=True)
class DiffusionLoss:
    """What the reference computes from logits. Unpacks as ``loss, unweighted, ce, loss_mask``.

    Attributes:
        loss: scalar, weighted by 1/t and normalised as asked.
        unweighted: scalar, mean cross-entropy of masked positions.
        ce: cross-entropy of every label before masking, ``(B, L)`` or with shift ``(B, L - 1)``.
        loss_mask: bool, the labels that count.
    """

    loss: Tensor
    unweighted: Tensor
    ce: Tensor
    loss_mask: Tensor

    def __iter__(self):
        return iter((self.loss, self.unweighted, self.ce, self.loss_mask))


def diffusion_loss(
    logits: Tensor,
    x: Tensor,
    x_t: Tensor,
    t: Tensor,
    mask_id: int,
    shift: bool,
    loss_norm: str = "masked",
    drawn_mask: Tensor | None = None,
) -> DiffusionLoss:
    """The objective of specification 4.1 from dense logits; training computes the same without them.

    Args:
        logits: ``(B, L, V)``, not shifted.
        x, x_t: clean and noised ids, ``(B, L)``.
        t: times, ``(B,)``.
        loss_norm: ``masked`` divides by the masked labels (the reference; about twice the bound), ``tokens`` by all
            labels (the bound on the NLL per token).
        drawn_mask: positions that were masked; None tests ``x_t == mask_id`` as the reference does, which also counts
            clean occurrences of that id.
    """
    require_choice("loss_norm", loss_norm, LOSS_NORMS)
    loss_mask = (x_t == mask_id) if drawn_mask is None else drawn_mask.bool()
    target = x
    if shift:
        logits, target, loss_mask = logits[:, :-1], x[:, 1:], loss_mask[:, 1:]
    ce = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
    counted = torch.where(loss_mask, ce, 0.0)
    masked = loss_mask.sum().clamp(min=1)
    labels = masked if loss_norm == "masked" else loss_mask.numel()
    return DiffusionLoss((counted / t[:, None]).sum() / labels, counted.sum() / masked, ce, loss_mask)


def loss_positions(drawn_BL: Tensor, shift: bool) -> Tensor:
    """Masked positions that have a prediction: with shift all but the first."""
    if not shift:
        return drawn_BL
    where_BL = drawn_BL.clone()
    where_BL[:, 0] = False
    return where_BL


def label_count(rows: int, length: int, shift: bool) -> int:
    """Labels of a batch, which ``loss_norm=tokens`` divides by."""
    return rows * (length - 1 if shift else length)
