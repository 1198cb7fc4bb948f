"""Features of handwritten digits by a small classifier: metrics of images without a download.

The distances have the form of FID and of the Inception Score but another network, and go by other names.

Dimensions: B images, D = 32 features, E spatial features, K = 10 classes.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import DataError
from common.seeding import generator
from mup_dit.datasets import build_dataset
from mup_dit.metrics.features import Features, Images, by_size

SIDE, CLASSES, FEATURES = 8, 10, 32
EPOCHS, BATCH, LEARNING_RATE = 12, 64, 3e-3
SPATIAL_CHANNELS = 7


class DigitClassifier(nn.Module):
    """Two convolutions and two linear layers on 8 x 8 pixels."""

    def __init__(self, rng: torch.Generator) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 16, FEATURES)
        self.readout = nn.Linear(FEATURES, CLASSES)
        for layer in (self.conv1, self.conv2, self.hidden, self.readout):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.weight[0].numel()), generator=rng)
            nn.init.zeros_(layer.bias)

    def forward(self, x_B1SS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, spatial features, class scores; input in [-1, 1]."""
        x = torch.relu(self.conv1(x_B1SS))
        spatial_BE = nn.functional.max_pool2d(x[:, :SPATIAL_CHANNELS], 2).flatten(1)
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        pool_BD = torch.relu(self.hidden(x.flatten(1)))
        return pool_BD, spatial_BE, self.readout(pool_BD)


@functools.cache
def train_digit_classifier(seed: int = 0) -> DigitClassifier:
    """Trained on the 1536 digits of the training split; the same network for the same seed."""
    dataset = build_dataset("digits", "train", size=SIDE)
    data = dataset.fetch(np.arange(len(dataset)))
    network = DigitClassifier(generator(seed, "digit classifier"))
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(dataset), generator=generator(seed, "digit classifier order", epoch))
        for rows in order.split(BATCH):
            loss = nn.functional.cross_entropy(network(data["image"][rows])[2], data["label"][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval().requires_grad_(False)


class DigitFeatures:
    """Metrics of 8 x 8 grey images. Colour images are averaged over channels."""

    name = "classifier of handwritten digits, trained on the fly"
    names = {
        "fid": "frechet_digits", "sfid": "frechet_digits_spatial", "is": "classifier_score_digits",
        "precision": "precision_digits", "recall": "recall_digits",
    }  # fmt: skip

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.enable_grad():
            self.network = train_digit_classifier().to(device)

    @torch.no_grad()
    def __call__(self, images: Images) -> Features:
        """Raises: DataError for images of another size."""
        for image in images:
            if image.shape[:2] != (SIDE, SIDE):
                raise DataError(
                    f"features=digits takes images of {SIDE} x {SIDE} pixels, but one has {image.shape[0]} x "
                    f"{image.shape[1]}; use features=inception."
                )
        return Features(*by_size(images, self._scaled, self.device))

    def _scaled(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        return self.network(x_BCHW.float().mean(dim=1, keepdim=True) / 127.5 - 1)
