"""What the parameters of a network look like: norms, deviations, a histogram."""

from typing import Any

import torch
from torch import nn

BINS, RANGE = 100, 0.5
"""Histogram of the entries of matrices: bins between -RANGE and RANGE; the outer ones count what lies beyond."""


@torch.no_grad()
def measure_parameters(network: nn.Module) -> dict[str, Any]:
    """Statistics of every tensor and of all of them; tied parameters count once.

    Returns: ``parameters`` (number of values), ``norm`` (of all as one vector), ``sum_of_norms`` (of each tensor's
    Frobenius norm), ``tensors`` (a row each) and ``histogram`` of the entries of tensors with two or more dimensions.
    """
    rows, counts_B = [], torch.zeros(BINS, dtype=torch.float64)
    for name, value in network.named_parameters():
        value = value.detach().float().cpu()
        deviation = float(value.std()) if value.numel() > 1 else 0.0
        rows.append(
            {
                "tensor": name,
                "shape": list(value.shape),
                "norm": float(torch.linalg.vector_norm(value)),
                "mean": float(value.mean()),
                "deviation": deviation,
                "smallest": float(value.min()),
                "largest": float(value.max()),
            }
        )
        if value.dim() > 1:
            inside = value.clamp(-RANGE * (1 - 1e-6), RANGE * (1 - 1e-6))
            counts_B += torch.histc(inside, BINS, -RANGE, RANGE).double()
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "norm": sum(row["norm"] ** 2 for row in rows) ** 0.5,
        "sum_of_norms": sum(row["norm"] for row in rows),
        "tensors": rows,
        "histogram": counts_B.tolist(),
    }
