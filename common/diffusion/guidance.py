"""Classifier-free guidance without retraining: the prediction with the given tokens against the one without them.

Dimensions: R sequences in flight, L positions, P positions with predictions, V vocabulary.
"""

import torch
from torch import Tensor

from common.config import require_at_least
from common.diffusion.absorbing import Denoiser


class GuidedDenoiser:
    """A denoiser (``absorbing.RowDenoiser``) of ``(1 + scale) log p(x | given) - scale log p(x)``, normalised.

    Both predictions come from one launch over 2R rows, so every call of a row is two network evaluations.

    Args:
        denoise: the network.
        mask_id: replaces given tokens in the second half.
        scale: weight of the difference; 0 gives the network's own predictions.
        keep: so many leading positions stay given in the second half (a begin-of-text token is no condition).

    Source: Ho and Salimans (2022); for masked diffusion Nie et al. (2024).
    """

    evaluations_per_call = 2

    def __init__(self, denoise: Denoiser, mask_id: int, scale: float, *, keep: int = 0) -> None:
        require_at_least("guidance", scale, 0)
        self._denoise, self._mask_id, self._scale, self._keep = denoise, mask_id, scale, keep

    def at_rows(self, tokens_RL: Tensor, where_RL: Tensor, *, index_R: Tensor, given_RL: Tensor) -> Tensor:
        hidden_RL = given_RL.clone()
        hidden_RL[:, : self._keep] = False
        without_RL = tokens_RL.masked_fill(hidden_RL, self._mask_id)
        both_PV = self._denoise(torch.cat([tokens_RL, without_RL]), torch.cat([where_RL, where_RL]))
        conditional_PV, free_PV = both_PV.chunk(2)
        guided_PV = (1 + self._scale) * conditional_PV - self._scale * free_PV
        impossible_PV = conditional_PV == -torch.inf  # -inf less -inf would be NaN
        return guided_PV.masked_fill(impossible_PV, -torch.inf).log_softmax(-1)
