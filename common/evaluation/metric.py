"""Numbers with their uncertainty, as every evaluator yields them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """One result.

    Attributes:
        name: with its unit where that is not obvious, e.g. ``nats_per_token``.
        standard_error: one standard deviation of ``value`` under the randomness that its evaluator names; None where
            nothing is random or one observation is all there is.
    """

    name: str
    value: float
    standard_error: float | None = None

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" +- {self.standard_error:.3g}"
        return f"{self.name} {self.value:.6g}{error}"


def mean_metric(name: str, values: Sequence[float] | Tensor) -> Metric:
    """Mean of independent observations and its standard error (None for a single one)."""
    values_B = torch.as_tensor(values, dtype=torch.float64)
    count = len(values_B)
    error = float(values_B.std(correction=1)) / math.sqrt(count) if count > 1 else None
    return Metric(name, float(values_B.mean()), error)


def perplexity_metric(name: str, nats: Metric) -> Metric:
    """exp of a mean in nats per token; the error by first-order propagation, so it presumes a small one."""
    value = math.exp(nats.value) if nats.value < 700 else math.inf
    return Metric(name, value, None if nats.standard_error is None else value * nats.standard_error)
