"""Features of a frozen vision transformer, which REPA aligns the image tokens of an MMDiT with.

Dimensions: B images, N patches, F features.

Source: Yu et al., 2024 (REPA); the encoder there is DINOv2.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import CheckpointError, ConfigError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FrozenFeatures:
    """Images in [-1, 1] -> ``(B, N, F)``: last hidden states of the patches, one for each image token of the network.

    Args:
        path: folder or hub name of a vision transformer of the library (DINOv2, ViT).
        grid: image tokens per side of the network that is trained.

    Raises: CheckpointError if there is no such model; ConfigError if it has no patches.
    """

    def __init__(self, path: str, grid: int) -> None:
        from transformers import AutoModel

        try:
            self.model = AutoModel.from_pretrained(path).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"data.repa_encoder={path} cannot be loaded: {reason} Give a local folder, or download it first."
            ) from None
        self.patch = getattr(self.model.config, "patch_size", None)
        if not isinstance(self.patch, int):
            raise ConfigError(f"data.repa_encoder={path} is no vision transformer; DINOv2 is customary.")
        self.grid = grid
        self.channels = int(self.model.config.hidden_size)

    @torch.no_grad()
    def __call__(self, image_BCHW: Tensor) -> Tensor:
        if self.model.device != image_BCHW.device:
            self.model.to(image_BCHW.device)
        image = (image_BCHW.float().expand(-1, 3, -1, -1) + 1) / 2
        mean, std = (image.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        side = self.grid * self.patch
        image = F.interpolate(image, size=(side, side), mode="bicubic", align_corners=False, antialias=True)
        hidden_BNF = self.model((image - mean) / std, interpolate_pos_encoding=True).last_hidden_state
        return hidden_BNF[:, -(self.grid**2) :]  # class and register tokens stand in front
