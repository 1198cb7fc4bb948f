"""Batch normalisation whose statistics are those of all processes.

The denoiser sees a random mix of tokens; if every process normalised by its own, the loss would depend on how many
there are. Dimensions: R rows, C channels, D length.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


def in_backward() -> bool:
    """Whether autograd is running, that is, whether activation checkpointing recomputes a forward pass."""
    return torch._C._current_graph_task_id() != -1


class _SumOverProcesses(torch.autograd.Function):
    """The sum over all processes; so is its gradient, because every process's loss depends on every summand."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class BatchNorm(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` with the same keys. In training the mean and variance are over the rows of all processes, and
    a recomputed forward pass does not update the running statistics a second time. All processes must hold equally many
    rows, as those of one global batch do.
    """

    def forward(self, x_RCD: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x_RCD)
        if dist.is_initialized() and dist.get_world_size() > 1:
            return self._over_processes(x_RCD)
        if in_backward():
            # copies, because a recomputation must keep as many tensors as the first pass did
            mean_C, variance_C = self.running_mean.clone(), self.running_var.clone()
            return F.batch_norm(x_RCD, mean_C, variance_C, self.weight, self.bias, True, 0.0, self.eps)
        return super().forward(x_RCD)

    def _over_processes(self, x_RCD: Tensor) -> Tensor:
        ranks = dist.get_world_size()
        with torch.autocast(x_RCD.device.type, enabled=False):
            x = x_RCD.float()
            mean_C = _SumOverProcesses.apply(x.mean(dim=(0, 2))) / ranks
            centred = x - mean_C[:, None]
            variance_C = _SumOverProcesses.apply(centred.square().mean(dim=(0, 2))) / ranks
            if not in_backward():
                self._update(mean_C.detach(), variance_C.detach(), ranks * x.shape[0] * x.shape[2])
            scale_C = torch.rsqrt(variance_C + self.eps) * self.weight
            return (centred * scale_C[:, None] + self.bias[:, None]).to(x_RCD.dtype)

    @torch.no_grad()
    def _update(self, mean_C: Tensor, variance_C: Tensor, count: int) -> None:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean_C, self.momentum)
        self.running_var.lerp_(variance_C * (count / max(count - 1, 1)), self.momentum)
