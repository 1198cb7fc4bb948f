"""The Mamba-2 block, whole sequences and single steps; keys are those of the published implementation.

Dimensions: B batch, L positions, M model width, X inner width (expand x M), H heads, P values per head, G groups,
N state size, C = X + 2 G N channels of the convolution, K its kernel.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import ConfigError
from rpg import mamba_kernels
from rpg.ssd import ssd_scan, ssd_step, step_sizes

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4
EPSILON = 1e-5


@dataclass
class StepState:
    """What a block remembers between single steps.

    Attributes:
        conv_BCK: the last K inputs of the convolution, newest last.
        ssm_BHPN: the state of the recurrence, float32.
    """

    conv_BCK: Tensor
    ssm_BHPN: Tensor


class GatedRMSNorm(nn.Module):
    """``rms_norm(y * silu(z)) * weight`` over each group of channels, in float32."""

    def __init__(self, size: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups = groups

    def forward(self, y_BLX: Tensor, z_BLX: Tensor) -> Tensor:
        with torch.autocast(y_BLX.device.type, enabled=False):
            shape = (self.groups, -1)
            parts = (y_BLX.float().unflatten(-1, shape), z_BLX.float().unflatten(-1, shape))
            return _GatedNorm.apply(*parts, self.weight.float().view(shape)).flatten(-2).to(y_BLX.dtype)


class _GatedNorm(torch.autograd.Function):
    """The norm with a backward pass of its own, which keeps three tensors where autograd would keep seven."""

    @staticmethod
    def forward(ctx, y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        gated = F.silu(z).mul_(y)
        inverse = (gated * gated).mean(-1, keepdim=True).add_(EPSILON).rsqrt_()
        ctx.save_for_backward(y, z, weight, inverse)
        return gated.mul_(inverse).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, z, weight, inverse = ctx.saved_tensors
        silu = F.silu(z)
        normed = (y * silu).mul_(inverse)
        d_weight = (d_out * normed).sum(dim=tuple(range(d_out.ndim - 2)))
        d_normed = d_out * weight
        share = (d_normed * normed).mean(-1, keepdim=True)
        d_gated = d_normed.sub_(normed.mul_(share)).mul_(inverse)
        d_z = torch.ops.aten.silu_backward(d_gated * y, z)
        return d_gated.mul_(silu), d_z, d_weight


class Mamba2Mixer(nn.Module):
    """Mamba-2: ``(B, L, M) -> (B, L, O)``.

    Args:
        d_model: M; ``expand * d_model`` must be a multiple of ``headdim``.
        d_input: width of the input where it differs from ``d_model`` (the second block of the two-width stack).
        chunk_size: positions per chunk; changes speed and memory, not the numbers.

    Source: Dao and Gu, 2024; as RPG (Wang et al., 2025) uses it.

    Raises: ConfigError for widths that do not fit together.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        chunk_size: int = 64,
        d_input: int | None = None,
    ) -> None:
        super().__init__()
        check_widths(d_model, expand, headdim, ngroups)
        self.d_model, self.d_inner, self.headdim, self.ngroups = d_model, expand * d_model, headdim, ngroups
        self.d_state, self.d_conv, self.chunk_size = d_state, d_conv, chunk_size
        self.nheads = self.d_inner // headdim
        channels = self.d_inner + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_input or d_model, self.d_inner + channels + self.nheads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, padding=d_conv - 1)
        self.dt_bias = nn.Parameter(_initial_dt_bias(self.nheads))
        self.A_log = nn.Parameter(torch.empty(self.nheads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = GatedRMSNorm(self.d_inner, ngroups)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, u_BLM: Tensor) -> Tensor:
        sizes = [self.d_inner, self.conv1d.in_channels, self.nheads]
        z_BLX, xBC_BLC, dt_BLH = self.in_proj(u_BLM).split(sizes, dim=-1)
        if mamba_kernels.usable(u_BLM):
            y_BLX = mamba_kernels.mix(self, xBC_BLC, dt_BLH)
        else:
            y_BLX = self._mix(xBC_BLC, dt_BLH)
        return self.out_proj(self.norm(y_BLX, z_BLX))

    def _mix(self, xBC_BLC: Tensor, dt_BLH: Tensor) -> Tensor:
        with torch.autocast(xBC_BLC.device.type, enabled=False):  # the products take the dtype that comes in
            xBC_BLC = F.silu(causal_conv(xBC_BLC, self.conv1d.weight, self.conv1d.bias))
            x_BLHP, B_BLGN, C_BLGN = self._heads(xBC_BLC)
            a_BLH = step_sizes(dt_BLH, self.dt_bias)
            A_H = -torch.exp(self.A_log.float())
            y_BLHP, _ = ssd_scan(x_BLHP, a_BLH, A_H, B_BLGN, C_BLGN, self.D, chunk_size=self.chunk_size)
        return y_BLHP.flatten(2)

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_inner, states, states], dim=-1)
        shape = (self.ngroups, self.d_state)
        return x.unflatten(-1, (self.nheads, self.headdim)), B.unflatten(-1, shape), C.unflatten(-1, shape)

    def initial_state(self, batch: int) -> StepState:
        """Zeros: before the first position."""
        device = self.A_log.device
        return StepState(
            torch.zeros(batch, self.conv1d.in_channels, self.d_conv, device=device),
            torch.zeros(batch, self.nheads, self.headdim, self.d_state, device=device),
        )

    def step(self, u_BM: Tensor, state: StepState) -> tuple[Tensor, StepState]:
        """The next position of the same sequence: ``(B, M)`` and the new state."""
        sizes = [self.d_inner, self.conv1d.in_channels, self.nheads]
        z_BX, xBC_BC, dt_BH = self.in_proj(u_BM).split(sizes, dim=-1)
        conv_BCK = torch.cat([state.conv_BCK[..., 1:], xBC_BC[..., None].to(state.conv_BCK.dtype)], dim=-1)
        xBC_BC = F.silu((conv_BCK * self.conv1d.weight[:, 0]).sum(-1) + self.conv1d.bias).to(xBC_BC.dtype)
        x_BHP, B_BGN, C_BGN = self._heads(xBC_BC)
        a_BH = step_sizes(dt_BH, self.dt_bias)
        A_H = -torch.exp(self.A_log.float())
        y_BHP, ssm_BHPN = ssd_step(state.ssm_BHPN, x_BHP, a_BH, A_H, B_BGN, C_BGN, self.D)
        return self.out_proj(self.norm(y_BHP.flatten(1), z_BX)), StepState(conv_BCK, ssm_BHPN)


def check_widths(d_model: int, expand: int, headdim: int, ngroups: int = 1, name: str = "model") -> None:
    """Raises ConfigError unless the inner width splits into heads, and the heads into groups."""
    inner = expand * d_model
    if headdim < 1 or inner % headdim:
        near = max(1, round(inner / max(headdim, 1))) * headdim
        remedy = f"use {name}.d_model={near // expand}" if near % expand == 0 else "change one of them"
        raise ConfigError(
            f"{name}.d_model={d_model} x {name}.expand={expand} = {inner} is not a multiple of {name}.headdim="
            f"{headdim}; {remedy}, or a headdim that divides it."
        )
    if ngroups < 1 or (inner // headdim) % ngroups:
        raise ConfigError(f"{name}.ngroups={ngroups} does not divide the {inner // headdim} heads; use 1.")


def causal_conv(x_BLC: Tensor, weight_C1K: Tensor, bias_C: Tensor) -> Tensor:
    """Depthwise convolution over positions that sees the present and the K - 1 before it."""
    length, kernel = x_BLC.shape[1], weight_C1K.shape[-1]
    weight = weight_C1K.to(x_BLC.dtype)
    y_BCL = F.conv1d(x_BLC.transpose(1, 2), weight, bias_C.to(x_BLC.dtype), padding=kernel - 1, groups=len(weight))
    return y_BCL[..., :length].transpose(1, 2)


def _initial_dt_bias(heads: int) -> Tensor:
    """Inverse softplus of step sizes that are uniform in the logarithm."""
    low, high = math.log(DT_MIN), math.log(DT_MAX)
    dt_H = torch.exp(torch.rand(heads) * (high - low) + low).clamp(min=DT_FLOOR)
    return dt_H + torch.log(-torch.expm1(-dt_H))
