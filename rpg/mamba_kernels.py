"""The CUDA kernels of mamba-ssm and causal-conv1d, used where they are installed; the PyTorch path gives the same.

Dimensions: B batch, L positions, X inner width, C channels, H heads (see ``rpg/mamba2.py``).
"""

import functools
import logging
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from rpg.mamba2 import Mamba2Mixer

SWITCH = "QUINTET_MAMBA_KERNELS"  # 0: the PyTorch path even where the kernels are installed
KERNEL_CHUNK = 256

logger = logging.getLogger(__name__)


@functools.cache
def _load() -> tuple | None:
    """``(scan, convolution or None)``; None without the kernels."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return None
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError:
        causal_conv1d_fn = None
    logger.info("Mamba-2 runs on the kernels of mamba-ssm; %s=0 switches them off.", SWITCH)
    return mamba_chunk_scan_combined, causal_conv1d_fn


def usable(tensor: Tensor) -> bool:
    """Whether a block should run on them: a CUDA tensor, installed, not switched off."""
    return tensor.is_cuda and os.environ.get(SWITCH, "1") != "0" and _load() is not None


def mix(block: "Mamba2Mixer", xBC_BLC: Tensor, dt_BLH: Tensor) -> Tensor:
    """Convolution and scan of ``block``, ``(B, L, X)``."""
    from rpg.mamba2 import causal_conv

    scan, convolve = _load()
    with torch.autocast(xBC_BLC.device.type, enabled=False):
        weight, bias = block.conv1d.weight.to(xBC_BLC.dtype), block.conv1d.bias.to(xBC_BLC.dtype)
        if convolve is not None:
            xBC_BLC = convolve(xBC_BLC.transpose(1, 2), weight[:, 0], bias, activation="silu").transpose(1, 2)
        else:
            xBC_BLC = F.silu(causal_conv(xBC_BLC, weight, bias))
        x_BLHP, B_BLGN, C_BLGN = block._heads(xBC_BLC)
        y_BLHP = scan(
            x_BLHP,
            dt_BLH,
            -torch.exp(block.A_log.float()),
            B_BLGN,
            C_BLGN,
            chunk_size=KERNEL_CHUNK,
            D=block.D.float(),
            dt_bias=block.dt_bias.float(),
            dt_softplus=True,
        )
    return y_BLHP.flatten(2)
