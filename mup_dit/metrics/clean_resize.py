"""The resizing of clean-fid and of PixArt-alpha's folder FID.

Source: specification 6; Parmar et al. 2022 (arXiv 2104.11222): anti-aliased bicubic resizing in float, not rounded.

Dimensions: B images, C channels, H, W rows and columns of pixels.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mup_dit.image_files import to_image
from mup_dit.metrics.features import Images
from mup_dit.metrics.inception import SIDE


def square(pixels_HWC: NDArray[np.uint8], size: int | None) -> NDArray[np.uint8]:
    """RGB: the middle square of the short side's length, by Lanczos to ``size`` pixels; None: left as it is."""
    image = to_image(pixels_HWC).convert("RGB")
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image)


def clean_resize(pixels_HWC: NDArray[np.uint8], side: int = SIDE) -> NDArray[np.float32]:
    """float32 ``(side, side, C)`` in [0, 255], every channel for itself."""
    channels = []
    for channel in range(pixels_HWC.shape[2]):
        image = Image.fromarray(pixels_HWC[..., channel].astype(np.float32))
        channels.append(np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).clip(0, 255))
    return np.stack(channels, axis=-1)


def clean_batch(images: Images, size: int | None) -> Tensor:
    """float32 ``(B, 3, 299, 299)``, ready for the Inception network."""
    prepared = [clean_resize(square(image, size)) for image in images]
    return torch.from_numpy(np.stack(prepared)).permute(0, 3, 1, 2).contiguous()
