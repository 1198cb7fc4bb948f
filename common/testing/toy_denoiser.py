"""A denoiser that knows the data distribution: a table look-up on a small joint distribution, for exact tests."""

import itertools

import torch
from torch import Tensor


class ToyDenoiser:
    """Exact conditionals of a random joint distribution over ``tokens ** length`` sequences; the mask id is ``tokens``.

    Attributes:
        joint_K: probability of each sequence, numbered in base ``tokens``, first position most significant.
        row_evaluations: rows evaluated since creation.
        launches: calls since creation.
    """

    def __init__(self, tokens: int = 3, length: int = 3, seed: int = 0) -> None:
        self.tokens, self.length, self.mask_id = tokens, length, tokens
        draw = torch.Generator().manual_seed(seed)
        self.joint_K = torch.softmax(1.5 * torch.randn(tokens**length, generator=draw, dtype=torch.float64), dim=0)
        self.row_evaluations = self.launches = 0
        sequences_KL = torch.tensor(list(itertools.product(range(tokens), repeat=length)))
        states_SL = torch.tensor(list(itertools.product(range(tokens + 1), repeat=length)))
        fits_SK = ((states_SL[:, None] == sequences_KL) | (states_SL[:, None] == self.mask_id)).all(-1)
        weight_SK = fits_SK * self.joint_K
        one_hot_KLV = torch.nn.functional.one_hot(sequences_KL, tokens + 1).double()
        table_SLV = torch.einsum("sk,klv->slv", weight_SK, one_hot_KLV) / weight_SK.sum(1)[:, None, None]
        self._log_probs_SLV = table_SLV.log().float()
        self._place_L = (tokens + 1) ** torch.arange(length - 1, -1, -1)

    def __call__(self, tokens_RL: Tensor, where_RL: Tensor) -> Tensor:
        self.row_evaluations += len(tokens_RL)
        self.launches += 1
        return self._log_probs_SLV[(tokens_RL * self._place_L).sum(1)][where_RL]

    def canvas(self, size: int) -> Tensor:
        """``size`` all-masked rows."""
        return torch.full((size, self.length), self.mask_id)

    def outcome(self, tokens_BL: Tensor) -> Tensor:
        """Number of each sequence."""
        return (tokens_BL * self.tokens ** torch.arange(self.length - 1, -1, -1)).sum(1)

    def counts(self, tokens_BL: Tensor) -> Tensor:
        """How often each sequence occurs."""
        return torch.bincount(self.outcome(tokens_BL), minlength=len(self.joint_K))


class ConstantDenoiser:
    """Predicts one fixed distribution everywhere, with a mask column of -inf appended."""

    def __init__(self, probabilities: Tensor) -> None:
        self.mask_id = len(probabilities)
        self._log_probs_V = torch.cat([probabilities.log(), torch.tensor([-torch.inf])]).float()

    def __call__(self, tokens_RL: Tensor, where_RL: Tensor) -> Tensor:
        return self._log_probs_V.expand(int(where_RL.sum()), -1)
