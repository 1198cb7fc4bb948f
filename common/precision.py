"""Number format of the forward pass: float32, or bfloat16/float16 by autocast over float32 parameters."""

import contextlib
import logging
from dataclasses import dataclass

import torch
from torch import nn

from common.errors import ConfigError

logger = logging.getLogger(__name__)


def has_native_bf16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run in hardware, rather than by conversion to float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def resolve_precision(precision: str, device: torch.device, plan: str = "none") -> str:
    """``"bf16"``, ``"fp16"`` or ``"fp32"`` for the configured value; ``auto`` takes the fastest that trains soundly.

    ``auto`` is bf16 where the hardware multiplies it natively, fp16 with loss scaling on older NVIDIA GPUs, else fp32.

    Raises: ConfigError for a combination that the library behind ``plan`` cannot run.
    """
    sharded_by_deepspeed = plan.startswith("zero")
    if precision == "auto":
        if has_native_bf16(device):
            precision = "bf16"
        elif device.type == "cuda" and not sharded_by_deepspeed:
            precision = "fp16"
        else:
            precision = "fp32"
    if precision == "fp16" and sharded_by_deepspeed:
        raise ConfigError(
            f"precision=fp16 does not work with parallel.plan={plan}: loss scaling needs the gradients that DeepSpeed "
            "keeps to itself. Use precision=bf16 or fp32, or parallel.plan=fsdp2."
        )
    if precision == "bf16" and not has_native_bf16(device):
        logger.warning("precision=bf16: this %s has no native bfloat16, expect it to be slow", device.type)
    return precision


@contextlib.contextmanager
def autocast(precision: str, device: torch.device):
    """Autocast region of a resolved precision; does nothing for fp32.

    The weight cache stays off: it would keep casts of parameters that sharded plans free and refill.
    """
    if precision == "fp32":
        yield
        return
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    with torch.autocast(device.type, dtype=dtype, cache_enabled=False):
        yield


def autocast_forward(module: nn.Module, precision: str, device: torch.device) -> None:
    """Makes every call of ``module`` run its forward under autocast; losses outside the module stay in float32.

    Inside the module rather than around the training step, because DeepSpeed switches an outer autocast off.
    """
    if precision == "fp32":
        return
    forward = module.forward

    def forward_in_autocast(*args, **kwargs):
        with autocast(precision, device):
            return forward(*args, **kwargs)

    module.forward = forward_in_autocast


@dataclass
class LossScaler:
    """Dynamic loss scale of float16: doubles after ``growth_interval`` sound steps, halves after an overflow.

    torch's GradScaler looks for overflow in the gradients of one process. The trainer has the global gradient norm
    anyway, on which all ranks agree also when gradients are sharded, so the decision is made from that.
    """

    enabled: bool
    scale: float = 2.0**16
    growth_interval: int = 2000
    sound_steps: int = 0
    smallest: float = 1.0

    def __post_init__(self) -> None:
        if not self.enabled:
            self.scale = 1.0

    def update(self, finite: bool) -> None:
        """Adapts the scale to one step's outcome."""
        if not self.enabled:
            return
        if not finite:
            self.scale, self.sound_steps = max(self.scale / 2, self.smallest), 0
            return
        self.sound_steps += 1
        if self.sound_steps == self.growth_interval:
            self.scale, self.sound_steps = self.scale * 2, 0

    @property
    def can_shrink(self) -> bool:
        """Whether an overflow may still be the scale's fault."""
        return self.enabled and self.scale > self.smallest

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "sound_steps": self.sound_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if self.enabled:
            self.scale, self.sound_steps = float(state["scale"]), int(state["sound_steps"])
