"""Many products with slices of one weight, whose gradient is gathered in one buffer.

Left to autograd, every slice of a weight gets a gradient as large as the whole weight, which is then added to the
others; a decoder that reads a few rows of a large matrix for each of a dozen shapes would spend its backward pass on
zeros.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

FEW_ROWS = range(2, 7)
WIDE = 64
"""Products of few rows with a tall weight of at least so many columns are faster the other way round on a CPU: 2 rows
of 256 with 32768 outputs take 1.1 instead of 8.0 ms, 6 rows 2.2 instead of 6.5."""


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if x.dim() == 2 and len(x) in FEW_ROWS and x.shape[1] >= WIDE and x.device.type == "cpu":
        return torch.addmm(bias[:, None], weight, x.T).T.contiguous()
    return F.linear(x, weight, bias)


class _SlicedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, bias: Tensor, slices: Sequence[slice], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.slices = slices
        ctx.save_for_backward(weight, *inputs)
        return tuple(_linear(x, weight[part], bias[part]) for x, part in zip(inputs, slices, strict=True))

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        weight, *inputs = ctx.saved_tensors
        weight_gradient = torch.zeros_like(weight)
        bias_gradient = weight.new_zeros(len(weight))
        input_gradients = []
        for x, part, gradient in zip(inputs, ctx.slices, gradients, strict=True):
            if gradient is None:
                input_gradients.append(None)
                continue
            rows = gradient.flatten(0, -2)
            weight_gradient[part].addmm_(rows.T, x.flatten(0, -2))
            bias_gradient[part] += rows.sum(0)
            input_gradients.append(gradient @ weight[part])
        return weight_gradient, bias_gradient, None, *input_gradients


def sliced_linear(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor, slices: Sequence[slice]
) -> tuple[Tensor, ...]:
    """``x @ weight[part].T + bias[part]`` for each pair of an input ``(..., r)`` and a slice of the weight's rows."""
    return _SlicedLinear.apply(weight, bias, tuple(slices), *inputs)
