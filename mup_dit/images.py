"""Images of any size -> square tensors in [-1, 1].

Dimensions: B images, C channels, S side, H, W rows and columns of pixels.

Source: specification 4.1 (ADM's crop), 4.3 (PixArt-alpha's).
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.config import require_choice
from common.errors import ConfigError

CROPS = ("adm", "pixart", "none")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop to ``size`` x ``size``: halve while at least ``size`` is left, scale the short side, cut the middle.

    Halving by boxes first keeps the bicubic step below a factor of two.
    """
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """PixArt-alpha's crop: the short side to ``size`` by one bilinear step, then the middle."""
    return fit_and_crop(image, size, size, Image.Resampling.BILINEAR)


def fit_and_crop(
    image: Image.Image, height: int, width: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """The smallest scaling that covers ``height`` x ``width``, and its middle; for aspect-ratio buckets."""
    scale = max(width / image.width, height / image.height)
    # never below the target: truncation of the other side may lose a pixel of it
    scaled = max(width, int(image.width * scale)), max(height, int(image.height * scale))
    image = image.resize(scaled, resample=resample)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _unchanged(image: Image.Image, size: int) -> Image.Image:
    if image.size != (size, size):
        raise ConfigError(
            f"data.crop=none needs images of {size} x {size}, but one has {image.height} x {image.width} (rows x "
            "columns); use data.crop=adm."
        )
    return image


_CROPS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "adm": center_crop,
    "pixart": resize_and_crop,
    "none": _unchanged,
}


def crop_image(image: Image.Image, size: int, crop: str, channels: int = 3) -> np.ndarray:
    """uint8 ``(H, W, C)`` with H = W = ``size``.

    Args:
        crop: ``adm``, ``pixart``, or ``none`` for images that have this size already.
        channels: 3 (colour) or 1 (grey).

    Raises: ConfigError for another crop or number of channels, or an image of another size with ``none``.
    """
    require_choice("data.crop", crop, CROPS)
    return to_array(_CROPS[crop](image.convert(color_mode(channels)), size))


def color_mode(channels: int) -> str:
    """Pillow's name for so many channels.

    Raises: ConfigError for other numbers than 1 and 3.
    """
    require_choice("channels", channels, (1, 3))
    return "L" if channels == 1 else "RGB"


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 ``(H, W, C)``, grey images too."""
    pixels = np.array(image)  # a copy: torch wants memory that it may write
    return pixels[..., None] if pixels.ndim == 2 else pixels


def to_tensor(pixels_BHWC: np.ndarray) -> Tensor:
    """uint8 ``(B, H, W, C)`` -> float32 ``(B, C, H, W)`` in [-1, 1]."""
    pixels_BCHW = torch.from_numpy(np.ascontiguousarray(pixels_BHWC)).permute(0, 3, 1, 2)
    return pixels_BCHW.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)
