"""Modulated layer norm and gated residual sum that keep little for the backward pass.

Written with ordinary operations, a block would keep the normalised tokens and, under autocast, float32 copies of every
branch. These keep the residual stream in the products' number format and the branch as it is; the norm is computed
again in the backward pass.

Dimensions: B batch, N tokens, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def compute_dtype(x: Tensor) -> torch.dtype:
    """The number format that matrix products of ``x`` run in: autocast's, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        # as rounded as the product's gradient, which is all that the backward pass gets
        ctx.save_for_backward(x_BND.to(dtype), scale_B1D)
        ctx.eps, ctx.x_dtype, ctx.shift_dtype = eps, x_BND.dtype, shift_B1D.dtype
        normal = F.layer_norm(x_BND, x_BND.shape[-1:], eps=eps)
        return torch.addcmul(shift_B1D.to(normal.dtype), normal, scale_B1D.to(normal.dtype) + 1).to(dtype)

    @staticmethod
    def backward(ctx, grad_BND: Tensor) -> tuple[Tensor | None, ...]:
        x_BND, scale_B1D = ctx.saved_tensors
        normal, mean, rstd = torch.native_layer_norm(x_BND, x_BND.shape[-1:], None, None, ctx.eps)
        shift = grad_BND.sum(dim=1, keepdim=True).to(ctx.shift_dtype)
        scale = (grad_BND * normal).sum(dim=1, keepdim=True).to(scale_B1D.dtype)
        inner = grad_BND * (scale_B1D.to(x_BND.dtype) + 1)
        only_input = [True, False, False]
        x, _, _ = torch.ops.aten.native_layer_norm_backward(
            inner, x_BND, x_BND.shape[-1:], mean, rstd, None, None, only_input
        )
        return x.to(ctx.x_dtype), shift, scale, None, None


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BND: Tensor, gate_B1D: Tensor, branch_BND: Tensor) -> Tensor:
        ctx.save_for_backward(gate_B1D, branch_BND)
        return torch.addcmul(x_BND, gate_B1D.to(x_BND.dtype), branch_BND.to(x_BND.dtype))

    @staticmethod
    def backward(ctx, grad_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate_B1D, branch_BND = ctx.saved_tensors
        gate = (grad_BND * branch_BND).sum(dim=1, keepdim=True).to(gate_B1D.dtype)
        return grad_BND, gate, (grad_BND * gate_B1D).to(branch_BND.dtype)


def modulated_norm(x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, eps: float) -> Tensor:
    """``layer_norm(x) (1 + scale) + shift``, in the number format of the matrix product that follows."""
    return _ModulatedNorm.apply(x_BND, shift_B1D, scale_B1D, eps, compute_dtype(x_BND))


def gated_sum(x_BND: Tensor, gate_B1D: Tensor, branch_BND: Tensor) -> Tensor:
    """``x + gate branch``, in the number format of ``x``."""
    return _GatedSum.apply(x_BND, gate_B1D, branch_BND)
