"""AdamW whose two moments take one byte per parameter each, in plain PyTorch on any device.

Each block of 256 values shares a float32 scale, its largest magnitude; code k of a block means (k / levels)^4 of the
scale, so that neighbouring codes differ by a few percent near the maximum and values of a billionth of it are still
told from zero. Two more choices keep the quantised state close to AdamW's: the root of the second moment is stored,
because it is what the update divides by; and codes are rounded up or down at fixed thresholds that are spread evenly
over the block and over steps, so that decay slower than the distance of two codes still happens on average.

Block-wise 8-bit states are those of Dettmers et al., 2022 (8-bit Optimizers via Block-wise Quantization), whose table
of codes has about the same relative distances; this one needs no search, which makes it 4 times faster on CPUs.

Dimensions: N values of a parameter, K blocks, Q = 256 values of a block.
"""

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from common.errors import ConfigError

BLOCK = 256
STATE_BYTES = 2 * (1 + 4 / BLOCK)  # per parameter of a large tensor
SMALLEST = 4096  # values from which a parameter's state is quantised
CPU_SLICE, GPU_SLICE = 128, 16384  # blocks that are decoded at a time: what a core's cache holds; 4 M values
LEVELS = {torch.int8: 127, torch.uint8: 255}  # largest code of a signed and an unsigned moment
MOMENTS = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}
GOLDEN_RATIO, SILVER_RATIO = 0.6180339887498949, 0.41421356237309515


def rounding_thresholds(step: int, device: torch.device) -> Tensor:
    """``(Q,)`` numbers in [0, 1), evenly spread over a block and, for one place of it, over steps."""
    place_Q = torch.arange(BLOCK, dtype=torch.float64, device=device)
    return ((place_Q * GOLDEN_RATIO + step * SILVER_RATIO) % 1.0).float()


def quantise(x_KQ: Tensor, threshold_Q: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes ``(K, Q)`` of ``dtype`` (int8: any sign, uint8: x >= 0) and scales ``(K,)``; on average exact."""
    levels, magnitude_KQ = LEVELS[dtype], x_KQ.abs()
    scale_K = magnitude_KQ.amax(1)
    magnitude_KQ /= scale_K.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    code_KQ = magnitude_KQ.sqrt().sqrt_().mul_(levels).floor_().clamp_(max=levels - 1)
    low_KQ, high_KQ = _fourth_power(code_KQ / levels), _fourth_power((code_KQ + 1) / levels)
    code_KQ += magnitude_KQ - low_KQ > threshold_Q * (high_KQ - low_KQ)
    if dtype == torch.int8:
        code_KQ = torch.copysign(code_KQ, x_KQ)
    return code_KQ.to(dtype), scale_K


def dequantise(code_KQ: Tensor, scale_K: Tensor) -> Tensor:
    """Float32 values ``(K, Q)``."""
    unit_KQ = code_KQ.float().div_(LEVELS[code_KQ.dtype])
    magnitude_KQ = _fourth_power(unit_KQ).mul_(scale_K[:, None])
    return magnitude_KQ if code_KQ.dtype == torch.uint8 else magnitude_KQ.copysign_(unit_KQ)


def _fourth_power(x: Tensor) -> Tensor:
    return x.square().square_()


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with block-wise 8-bit moments: about 2.03 instead of 8 bytes of state per parameter.

    The state of a parameter is ``step``, and either ``exp_avg`` and ``exp_avg_sq`` or, of both moments, ``*_codes`` and
    ``*_scales`` (``exp_avg_sq_codes`` hold the root of the second moment).

    Raises: ConfigError for parameters that are sharded (DTensor): a block must lie on one process.
    """

    def __init__(
        self,
        params: object,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": False})
        if any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            raise ConfigError(
                "optim.optimizer=AdamW8bit cannot quantise sharded parameters (parallel.plan=fsdp2); use "
                "optim.optimizer=AdamW, whose state fsdp2 shares out over the processes, or parallel=ddp."
            )

    def empty_state(self, parameter: Tensor, name: str) -> Tensor:
        """A zero tensor for entry ``name`` of the parameter's state, of the shape that it has."""
        num_values, device = parameter.numel(), parameter.device
        if name == "step":
            return torch.zeros(())
        num_blocks = math.ceil(num_values / BLOCK)
        if name.endswith("_codes"):
            return torch.zeros(num_blocks, BLOCK, dtype=MOMENTS[name.removesuffix("_codes")], device=device)
        if name.endswith("_scales"):
            return torch.zeros(num_blocks, device=device)
        return torch.zeros_like(parameter, memory_format=torch.contiguous_format, dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            names = tuple(MOMENTS)
            if parameter.numel() >= SMALLEST:
                names = tuple(f"{name}_{part}" for name in names for part in ("codes", "scales"))
            state.update({name: self.empty_state(parameter, name) for name in ("step", *names)})
        state["step"] += 1
        values = parameter.contiguous()
        value_N, gradient_N = values.view(-1), parameter.grad.reshape(-1)
        if "exp_avg" in state:
            first, second = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
            self._advance(value_N, gradient_N, first, second, state["step"].item(), group)
        else:
            size = BLOCK * (CPU_SLICE if parameter.device.type == "cpu" else GPU_SLICE)
            for start in range(0, parameter.numel(), size):
                part = slice(start, start + size)
                self._update_blocks(value_N[part], gradient_N[part], state, start, group)
        if values.data_ptr() != parameter.data_ptr():
            parameter.copy_(values)

    def _update_blocks(self, value_N: Tensor, gradient_N: Tensor, state: dict, start: int, group: dict) -> None:
        """One slice of a parameter: decode, advance, encode."""
        size, step = value_N.numel(), int(state["step"])
        blocks = slice(start // BLOCK, start // BLOCK + math.ceil(size / BLOCK))
        moments = {
            name: dequantise(state[f"{name}_codes"][blocks], state[f"{name}_scales"][blocks]) for name in MOMENTS
        }
        moments["exp_avg_sq"].square_()
        first_N, second_N = (moment.view(-1)[:size] for moment in moments.values())
        self._advance(value_N, gradient_N, first_N, second_N, step, group)
        moments["exp_avg_sq"].sqrt_()
        threshold_Q = rounding_thresholds(step, value_N.device)
        for name, dtype in MOMENTS.items():
            code_KQ, scale_K = quantise(moments[name], threshold_Q, dtype)
            state[f"{name}_codes"][blocks], state[f"{name}_scales"][blocks] = code_KQ, scale_K

    def _advance(
        self, value_N: Tensor, gradient_N: Tensor, first_N: Tensor, second_N: Tensor, step: float, group: dict
    ) -> None:
        """AdamW's update, in place."""
        beta1, beta2 = group["betas"]
        gradient_N = gradient_N.float()
        first_N.lerp_(gradient_N, 1 - beta1)
        second_N.mul_(beta2).addcmul_(gradient_N, gradient_N, value=1 - beta2)
        denominator_N = second_N.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        value_N.mul_(1 - group["lr"] * group["weight_decay"])
        value_N.addcdiv_(first_N, denominator_N, value=-group["lr"] / (1 - beta1**step))
