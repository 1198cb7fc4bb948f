"""GHN-3's decoder: a dense map from a node's embedding to a kernel of fixed channels, cropped to what is asked for.

Dimensions: R nodes, d width of the encoder, c0 and c1 decoded channels, s decoded kernel size.

Source: GHN-3 (Knyazev et al., 2023), after GHN-2 (Knyazev et al., 2021); golden case ``decoder_ghn3``.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from logah.decoder_lowrank import Request


class DenseDecoder(nn.Module):
    """Kernels of up to (c0, c1, s, s).

    Args:
        max_shape: (c0, c1, s, s).
        centred: the crop is taken round the centre of the kernel (GHN-3) or at its first corner (GHN-2).
    """

    def __init__(
        self, hid: int, max_shape: tuple[int, int, int, int], num_classes: int, *, centred: bool = True
    ) -> None:
        super().__init__()
        self.max_shape, self.centred = max_shape, centred
        outputs, inputs, size = max_shape[0], max_shape[1], max(max_shape[2:])
        self.size, self.width = size, 4 * hid
        self.fc = nn.Sequential(nn.Linear(hid, self.width * size**2), nn.ReLU())
        self.conv = nn.Sequential(nn.Linear(self.width, 8 * hid), nn.ReLU(), nn.Linear(8 * hid, outputs * inputs))
        self.class_layer_predictor = nn.Sequential(nn.ReLU(), nn.Linear(outputs, num_classes))

    def _crop(self, wanted: int) -> slice:
        if not self.centred:
            return slice(0, min(wanted, self.size))
        middle = self.size // 2
        return slice(max(0, middle - wanted // 2), min(self.size, middle + math.ceil(wanted / 2)))

    def kernel(self, x_Rd: Tensor, height: int, width: int, outputs: int, inputs: int) -> Tensor:
        """``(R, outputs, inputs, kh', kw')`` with k' = min(k, s): only pixels and channels of the crop are computed."""
        rows, columns = self._crop(height), self._crop(width)
        first, last = self.fc[0], self.conv[2]
        weight = first.weight.view(self.width, self.size, self.size, -1)[:, rows, columns]
        bias = first.bias.view(self.width, self.size, self.size)[:, rows, columns]
        kh, kw = weight.shape[1:3]
        pixels = F.relu(F.linear(x_Rd, weight.flatten(0, 2), bias.flatten())).view(-1, self.width, kh * kw)
        hidden = self.conv[:2](pixels.transpose(1, 2))
        channels = self.max_shape[:2]
        weight = last.weight.view(*channels, -1)[:outputs, :inputs]
        bias = last.bias.view(channels)[:outputs, :inputs]
        values = F.linear(hidden, weight.flatten(0, 1), bias.flatten()).transpose(1, 2)
        return values.reshape(len(x_Rd), *weight.shape[:2], kh, kw)

    def forward(self, x_Rd: Tensor, request: Request, kind: str = "4d") -> Tensor:
        """Requested tensors, with as many channels as there are.

        Args:
            kind: ``4d`` -> ``(R, <= o, <= i, kh, kw)``; ``class`` -> ``(R, num_classes, <= i)``.
        """
        outputs, inputs, height, width = request
        kernel = self.kernel(x_Rd, height, width, self.max_shape[0] if kind == "class" else outputs, inputs)
        if min(height, width) > self.size:
            resized = F.interpolate(kernel.flatten(0, 1), size=(height, width), mode="bilinear")
            kernel = resized.view(*kernel.shape[:3], height, width)
        if kind == "class":
            centre = kernel[..., kernel.shape[-2] // 2, kernel.shape[-1] // 2]
            return self.class_layer_predictor(centre.transpose(1, 2)).transpose(1, 2)
        return kernel


class VectorDecoder(nn.Module):
    """Vectors: d -> 2d -> (weight, bias) of c values each: ``(R, 2, c)``."""

    def __init__(self, hid: int, channels: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(hid, 2 * hid), nn.ReLU(), nn.Linear(2 * hid, 2 * channels))

    def forward(self, x_Rd: Tensor) -> Tensor:
        return self.fc(x_Rd).view(len(x_Rd), 2, -1)


@torch.no_grad()
def shrink_last_layers(*layers: nn.Linear) -> None:
    """GHN-3's start: the last maps give a fifth of their usual values and no bias."""
    for layer in layers:
        layer.weight /= 5
        layer.bias.zero_()
