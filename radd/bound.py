"""Exact values of the bounds that the losses estimate, by enumerating masks, and the range correction of the t losses.

For short sequences only: 2^L network rows. Used to check estimators, and to turn a sweep over mask counts into the
expectation of each loss.

Dimensions: L sequence, k number of masked positions.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import betainc
from torch import Tensor

from common.diffusion.schedules import LogLinear
from common.errors import ConfigError
from radd.losses import Denoiser

LONGEST = 16  # 65,536 masks


@dataclass(frozen=True)
class ExactBound:
    """All expectations of one short sequence, in nats per sequence.

    Attributes:
        mean_nll_k: S_k, expected summed NLL of the masked tokens when exactly k = 1..L are masked; float64 ``(L,)``.
        nll_by_mask: (positions still masked, position revealed) -> NLL; key is the mask as an integer of L bits.
        ao: expected NLL over all orders = expectation of lambda_DCE and of k_DCE.
    """

    length: int
    mean_nll_k: np.ndarray
    nll_by_mask: dict[tuple[int, int], float]

    @property
    def ao(self) -> float:
        return float((self.mean_nll_k / np.arange(1, self.length + 1)).sum())

    def order_nll(self, order: Sequence[int]) -> float:
        """NLL when tokens are revealed in ``order``."""
        masked, total = (1 << self.length) - 1, 0.0
        for position in order:
            total += self.nll_by_mask[masked, position]
            masked &= ~(1 << position)
        return total

    def all_order_nll(self) -> np.ndarray:
        """NLL of all L! orders, in the order of ``itertools.permutations``."""
        return np.array([self.order_nll(order) for order in itertools.permutations(range(self.length))])

    def t_dse(self, sampling_eps: float = 1e-3, eps: float = 1e-3) -> float:
        """Expectation of t_DSE under log-linear noise."""
        return t_dse_expectation(self.mean_nll_k, sampling_eps=sampling_eps, eps=eps)

    def t_dce(self, sampling_eps: float = 1e-3, eps: float = 1e-3) -> float:
        """Expectation of t_DCE under log-linear noise."""
        return self.t_dse(sampling_eps, eps) + self.length * t_dce_excess(sampling_eps=sampling_eps, eps=eps)


@torch.no_grad()
def enumerate_bound(denoise: Denoiser, x_L: Tensor, *, mask_id: int, rows_per_call: int = 256) -> ExactBound:
    """Every masked version of one sequence through the network.

    Args:
        denoise: ``denoise(tokens_RL, where_RL) -> log_probs_PV``.
        x_L: clean ids.

    Raises: ConfigError for more than 16 positions.
    """
    length = x_L.shape[0]
    if not 1 <= length <= LONGEST:
        raise ConfigError(f"length={length}: exact bounds need 2^length network rows; use 1 to {LONGEST} positions.")
    bit_L = 1 << torch.arange(length, device=x_L.device)
    nll_by_mask: dict[tuple[int, int], float] = {}
    sum_k = np.zeros(length + 1)
    for start in range(1, 1 << length, rows_per_call):
        mask_R = torch.arange(start, min(start + rows_per_call, 1 << length), device=x_L.device)
        where_RL = (mask_R[:, None] & bit_L) != 0
        clean_RL = x_L.expand(len(mask_R), length)
        log_probs_PV = denoise(clean_RL.masked_fill(where_RL, mask_id), where_RL)
        nll_P = -log_probs_PV.gather(1, clean_RL[where_RL][:, None]).squeeze(1).double()
        for (row, position), nll in zip(where_RL.nonzero().tolist(), nll_P.tolist()):
            mask = start + row
            nll_by_mask[mask, position] = nll
            sum_k[mask.bit_count()] += nll
    counts = np.array([math.comb(length, k) for k in range(1, length + 1)])
    return ExactBound(length, sum_k[1:] / counts, nll_by_mask)


def t_dse_expectation(mean_nll_k: np.ndarray, *, sampling_eps: float = 1e-3, eps: float = 1e-3) -> float:
    """Expectation of t_DSE in nats per sequence, from the mean NLL for every mask count.

    ``(1/(1-delta)) sum_k S_k/k [I_high(k, L-k+1) - I_low(k, L-k+1)]`` with I the regularised incomplete beta function
    at the masking levels of t = 1 and t = delta under log-linear noise. With both eps at 0 it is the exact bound.

    Args:
        mean_nll_k: S_k for k = 1..L, from ``enumerate_bound`` or from a sweep over counts.
        sampling_eps: delta, the smallest time drawn; eps: of the log-linear schedule.

    Source: specification section 3.4.
    """
    length = len(mean_nll_k)
    k = np.arange(1, length + 1)
    share_k = betainc(k, length - k + 1, 1 - eps) - betainc(k, length - k + 1, (1 - eps) * sampling_eps)
    return float((np.asarray(mean_nll_k, dtype=np.float64) / k * share_k).sum() / (1 - sampling_eps))


def t_dce_excess(*, sampling_eps: float = 1e-3, eps: float = 1e-3) -> float:
    """E[t_DCE] - E[t_DSE] in nats per token: (H(low) - H(high)) / (1 - delta), H the binary entropy in nats."""
    low, high = LogLinear(eps).mask_probability(torch.tensor([sampling_eps, 1.0], dtype=torch.float64)).tolist()
    return (_binary_entropy(low) - _binary_entropy(high)) / (1 - sampling_eps)


def _binary_entropy(p: float) -> float:
    return 0.0 if p <= 0 or p >= 1 else -p * math.log(p) - (1 - p) * math.log1p(-p)
