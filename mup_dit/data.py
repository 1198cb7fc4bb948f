"""What a run reads: images or cached latents with their conditions, and the encoders that images need meanwhile."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.config import require_at_least, require_choice
from common.data.loader import BatchedDataset
from common.errors import ConfigError
from common.seeding import derive_seed
from mup_dit.batches import ON_ERROR, Batch, Rows
from mup_dit.building import ModelConfig
from mup_dit.datasets import build_dataset
from mup_dit.encoders import load_text_encoder, load_vae
from mup_dit.images import CROPS
from mup_dit.repa import FrozenFeatures
from mup_dit.task import FeatureEncoder, LatentEncoder

NOISE = "noise"
NOISE_ROWS = 65_536


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Options of group ``data``; the names of data sets are listed in ``mup_dit/datasets.py``."""

    train: str = "digits"
    valid: str | None = None  # its validation part is read; null: no validation
    size: int | None = None  # side of the images in pixels; null: the latent's times the VAE's factor
    crop: str = "adm"  # adm|pixart|none
    flips: bool = False  # mirrored images too
    vae: str | None = None  # identity, folder or hub name of an AutoencoderKL; null: images are what is noised
    text: str | None = None  # small, folder or hub name of a T5; null: labels, or cached caption features
    latent_scale: float | None = None  # factor on cached latents; null: that of the VAE that made them
    repa_encoder: str | None = None  # folder or hub name of a frozen vision transformer, with model.repa_depth
    on_error: Literal["stop", "skip"] = "stop"  # at a missing or broken file
    num_workers: int = 0  # loader processes per training process

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError("data.train is empty; name images (data=digits needs no download).")
        require_choice("data.crop", self.crop, CROPS)
        require_choice("data.on_error", self.on_error, ON_ERROR)
        require_at_least("data.num_workers", self.num_workers, 0)
        if self.size is not None:
            require_at_least("data.size", self.size, 1)
        if self.train.startswith("features:") and self.vae is not None:
            raise ConfigError(f"data.train={self.train} holds latents; set data.vae=null, which is for images.")


@dataclass(frozen=True)
class Data:
    """What one run reads.

    Attributes:
        valid: held-out rows, if there are any.
        latent_scale: factor on cached latents.
        encoder: of images while training; None: images are what is noised, or latents are cached.
        features: frozen network of the REPA loss.
        decode: latents -> images in [-1, 1]; None: latents are images, or nothing can decode them.
    """

    train: BatchedDataset
    valid: BatchedDataset | None
    latent_scale: float
    encoder: LatentEncoder | None = None
    features: FeatureEncoder | None = None
    decode: Callable[[Tensor], Tensor] | None = None


def build_data(section: DataSection, model: ModelConfig, *, seed: int) -> Data:
    """Data sets and encoders of a run.

    Raises: ConfigError for names that cannot be read, DataError for data that cannot be used.
    """
    vae = None if section.vae in (None, "identity") else load_vae(section.vae)
    features = None
    if section.repa_encoder is not None:
        features = FrozenFeatures(section.repa_encoder, model.network.grid)
    text = section.text
    if text is not None and text != "small":
        text = load_text_encoder(text, length=model.network.model_max_length)

    def read(name: str, split: str) -> BatchedDataset:
        if name == NOISE:
            return Noise(model, derive_seed(seed, "noise data", 0 if split == "train" else 1))
        return build_dataset(
            name,
            split,
            size=section.size or model.network.input_size * (1 if vae is None else vae.factor),
            channels=model.network.in_channels if vae is None else 3,
            text=text,
            flips=section.flips and split == "train",
            crop=section.crop,
            on_error=section.on_error,
        )

    train = read(section.train, "train")
    stored_scale = getattr(train, "scale", 1.0)  # cached latents know the factor of their VAE
    return Data(
        train=train,
        valid=None if section.valid is None else read(section.valid, "validation"),
        latent_scale=stored_scale if section.latent_scale is None else section.latent_scale,
        encoder=vae,
        features=features,
        decode=None if vae is None else vae.decode,
    )


def describe_sources(section: DataSection, model: ModelConfig) -> dict[str, Any]:
    """What sampling needs besides the network: ``vae`` (a name) and ``text`` (a name, or a small one's description)."""
    if section.train.startswith("features:"):
        features = build_dataset(section.train, "train", size=section.size or model.network.input_size)
        return {"vae": features.vae, "text": features.text}
    text: Any = section.text
    if text == "small":
        size = section.size or model.network.input_size
        text = build_dataset(section.train, "train", size=size, text="small").text.to_dict()
    return {"vae": section.vae, "text": text}


class Noise:
    """Latents and conditions of pure noise, for coordinate checks and speed tests of any network without any data."""

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self.model, self.seed = model, seed

    def __len__(self) -> int:
        return NOISE_ROWS

    def fetch(self, rows: Rows) -> Batch:
        """Every row from a generator of its own."""
        items = [self._row(int(row)) for row in np.asarray(rows)]
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    def _row(self, row: int) -> Batch:
        network = self.model.network
        rng = torch.Generator().manual_seed(derive_seed(self.seed, "row", row))
        item = {"image": torch.randn(network.in_channels, network.input_size, network.input_size, generator=rng)}
        if self.model.family == "dit":
            return {**item, "label": torch.randint(network.num_classes, (), generator=rng)}
        item["caption"] = torch.randn(1, network.model_max_length, network.caption_channels, generator=rng)
        item["mask"] = torch.ones(network.model_max_length, dtype=torch.int64)
        if self.model.family == "mmdit":
            item["pooled"] = torch.randn(network.pooled_channels, generator=rng)
        elif network.micro_conditions:
            item |= {"img_hw": torch.full((2,), 8.0 * network.input_size), "aspect_ratio": torch.ones(1)}
        return item
