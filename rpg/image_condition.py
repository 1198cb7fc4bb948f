"""Example images as a condition: the mean feature of a few images by a frozen encoder.

A generator that was trained on such features (``data.condition=file``, ``rpg.extract_conditions``) takes those of new
examples. Encoders are ``digits`` (a small network that is trained here in a second), ``timm:NAME`` or ``timm:FOLDER``,
and a folder or hub name of transformers, such as a DINOv2 or CLIP.

Dimensions: N images, F features; H, W rows and columns of pixels.

Source: image-conditioned generation as Wang et al. (2025) show it; no code for it has been released.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import CheckpointError, ConfigError, DataError
from common.seeding import generator
from rpg.zoo.digits import DEVIATION, MEAN, load_images

DIGITS, TIMM = "digits", "timm:"
DIGIT_FEATURES, DIGIT_EPOCHS, DIGIT_BATCH, DIGIT_RATE = 32, 10, 32, 3e-3
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm")


class ImageEncoder(Protocol):
    """Images to features; ``name`` says which encoder it is."""

    name: str

    def __call__(self, images: Sequence[Any]) -> Tensor:
        """Pillow images (or, for ``digits``, standardised tensors (1, 8, 8)) -> features_NF, float32."""
        ...


def image_condition(encoder: ImageEncoder, images: Sequence[Any]) -> Tensor:
    """Condition of a few example images: the mean of their features, each scaled to a root mean square of one; (F,).

    Raises: DataError for no images, or features that are not finite.
    """
    if not len(images):
        raise DataError("images=[] gives no condition; name at least one example image.")
    features_NF = encoder(images).float()
    condition_F = (F.normalize(features_NF, dim=1) * math.sqrt(features_NF.shape[1])).mean(dim=0)
    if not torch.isfinite(condition_F).all():
        raise DataError(f"the encoder {encoder.name} gives features that are not finite for these images.")
    return condition_F.cpu()


def read_image(path: Path | str) -> Any:
    """A picture file as a Pillow image in RGB.

    Raises: DataError if it is missing or no picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}); give .png or .jpg files.") from None


def list_images(folder: Path | str) -> list[Path]:
    """Picture files of a folder, sorted.

    Raises: DataError if there are none.
    """
    folder = Path(folder)
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise DataError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    return found


def build_image_encoder(name: str, device: torch.device | str = "cpu") -> ImageEncoder:
    """The encoder called ``name``; see the module's list.

    Raises: CheckpointError if nothing can be loaded, ConfigError for an empty name.
    """
    if not name:
        raise ConfigError("encoder is empty; give digits, timm:NAME, or a folder or hub name of transformers.")
    if name == DIGITS:
        return DigitEncoder()
    return TimmEncoder(name, device) if name.startswith(TIMM) else TransformersEncoder(name, device)


# ---------------------------------------------------------------- digits


class DigitEncoder:
    """Features of handwritten digits: the hidden layer of a small classifier of the 797 digits to train on."""

    name = DIGITS

    def __init__(self, seed: int = 0) -> None:
        self.network = _train_digit_network(seed)

    @torch.no_grad()
    def __call__(self, images: Sequence[Any]) -> Tensor:
        batch_N1HW = torch.stack([image if isinstance(image, Tensor) else _as_digit(image) for image in images])
        return self.network[:-1](batch_N1HW)


def _as_digit(image: Any) -> Tensor:
    """A picture, light strokes on dark, at the digits' size and scale; (1, 8, 8)."""
    import numpy as np

    small = image.convert("L").resize((8, 8))
    return ((torch.from_numpy(np.array(small)).float() / 255 - MEAN) / DEVIATION)[None]


@functools.cache
def _train_digit_network(seed: int) -> nn.Sequential:
    images, rng = load_images(), generator(seed, "digit encoder")
    with torch.random.fork_rng(devices=[]):  # the layers' own draws, replaced below
        network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, DIGIT_FEATURES), nn.Tanh(), nn.Linear(DIGIT_FEATURES, 10),
        )  # fmt: skip
    for layer in network:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, std=math.sqrt(1.5 / layer.weight[0].numel()), generator=rng)
            nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adam(network.parameters(), DIGIT_RATE)
    count = len(images.train_label_N)
    for epoch in range(DIGIT_EPOCHS):
        order_N = torch.randperm(count, generator=generator(seed, "digit encoder order", epoch))
        for rows in order_N.split(DIGIT_BATCH):
            optimizer.zero_grad()
            F.cross_entropy(network(images.train_N1HW[rows]), images.train_label_N[rows]).backward()
            optimizer.step()
    return network.eval().requires_grad_(False)


# ---------------------------------------------------------------- libraries


class TimmEncoder:
    """Pooled features of a network of timm, with its own preprocessing."""

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        import timm

        self.name, self.device = name, device
        where = name.removeprefix(TIMM)
        try:
            folder = Path(where)
            spec = f"local-dir:{folder.resolve()}" if folder.is_dir() else where
            network = timm.create_model(spec, pretrained=True, num_classes=0)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise _not_loaded(name, error) from None
        self.network = network.eval().requires_grad_(False).to(device)
        self.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)

    @torch.no_grad()
    def __call__(self, images: Sequence[Any]) -> Tensor:
        batch_NCHW = torch.stack([self.transform(image) for image in images]).to(self.device)
        return self.network(batch_NCHW).flatten(1)


class TransformersEncoder:
    """Features of a vision model of transformers: image embedding (CLIP), pooled output, or mean of the last layer."""

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.name, self.device = name, device
        options = {"local_files_only": Path(name).is_dir()}
        try:
            self.processor = AutoImageProcessor.from_pretrained(name, **options)
            network = AutoModel.from_pretrained(name, use_safetensors=True, **options)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise _not_loaded(name, error) from None
        self.network = network.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, images: Sequence[Any]) -> Tensor:
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)
        if hasattr(self.network, "get_image_features"):
            output = self.network.get_image_features(pixel_values=pixels)
        else:
            output = self.network(pixel_values=pixels)
        if isinstance(output, Tensor):
            return output
        pooled = getattr(output, "pooler_output", None)
        return output.last_hidden_state.mean(dim=1) if pooled is None else pooled.flatten(1)


def _not_loaded(name: str, error: Exception) -> CheckpointError:
    lines = str(error).strip().splitlines() or [""]
    return CheckpointError(
        f"encoder={name} could not be loaded ({type(error).__name__}: {lines[0][:160]}); give digits, timm:NAME, or a "
        "folder or hub name of transformers with config.json, preprocessor_config.json and model.safetensors."
    )
