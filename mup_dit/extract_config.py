"""Options of ``python -m mup_dit.extract``, and the extractor that they describe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from common.config import require_at_least, require_choice
from common.errors import ConfigError
from common.parallel import Parallel
from mup_dit.batches import ON_ERROR, ImageDataset, TextEncoder
from mup_dit.datasets import build_dataset
from mup_dit.encoders import DTYPES, load_text_encoder, load_vae, save_small_text
from mup_dit.extraction import Extractor
from mup_dit.feature_files import write_feature_files
from mup_dit.file_dataset import FileDataset
from mup_dit.images import CROPS
from mup_dit.small_text import SmallTextEncoder

LAYOUTS = ("shards", "files")
STORED = ("fp16", "fp32")


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Options of ``python -m mup_dit.extract``."""

    dataset: str  # as data.train of mup_dit.train: digits, imagefolder:DIR, sa1b:DIR, ...
    output: str  # folder of the features
    split: str = "train"
    size: int = 256  # side of the images in pixels
    channels: int = 3  # 1: grey
    crop: Literal["adm", "pixart", "none"] = "adm"
    flips: bool = False  # the mirrored images too
    multi_scale: bool = False  # each image at the aspect ratio next to its own; sizes 256, 512, 1024
    vae: str | None = "ema"  # identity, ema, mse (Stable Diffusion's), folder or hub name; null: no latents
    text: str | None = None  # small, folder or hub name of a T5; null: no captions
    text_length: int | None = None  # tokens per caption; null: 120, small: 8
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the encoders
    dtype: Literal["fp16", "fp32"] = "fp16"  # of what is stored
    layout: Literal["shards", "files"] = "shards"  # files: one per image, as PixArt-alpha keeps SA-1B's
    shard_rows: int = 4096  # images per shard
    batch_size: int = 32  # images encoded at once
    start: int = 0  # first shard (layout=files: image) to make
    end: int | None = None  # the one after the last; null: all
    on_error: Literal["stop", "skip"] = "stop"  # at a file that cannot be read; skip: leave it out and list it
    num_workers: int = 0  # processes that read images
    device: str | None = None  # null: a GPU if there is one

    def __post_init__(self) -> None:
        for name, choices in (
            ("crop", CROPS),
            ("precision", tuple(DTYPES)),
            ("dtype", STORED),
            ("layout", LAYOUTS),
            ("on_error", ON_ERROR),
            ("channels", (1, 3)),
        ):
            require_choice(name, getattr(self, name), choices)
        for name in ("size", "shard_rows", "batch_size"):
            require_at_least(name, getattr(self, name), 1)
        for name in ("start", "num_workers"):
            require_at_least(name, getattr(self, name), 0)
        if self.end is not None and self.end <= self.start:
            raise ConfigError(f"end={self.end} must lie beyond start={self.start}; null: to the last.")
        if not self.output:
            raise ConfigError("output is empty; give a folder.")
        if self.dataset.startswith(("features:", "sa1b_latents:")):
            raise ConfigError(f"dataset={self.dataset} holds latents already; give images.")
        if self.layout == "files" and (self.multi_scale or self.flips):
            raise ConfigError("layout=files has no place for multi_scale or flips; use layout=shards.")


def extract_features(config: ExtractConfig, parallel: Parallel) -> dict[str, Any]:
    """Writes the features that ``config`` describes; several processes share the work.

    Returns: counts, on the main process.

    Raises: ConfigError, DataError or CheckpointError for anything the user can repair.
    """
    device = torch.device(config.device) if config.device else parallel.device
    # errors stop here, so that the extractor can list what it leaves out instead of taking a neighbour
    data = build_dataset(
        config.dataset, config.split, size=config.size, channels=config.channels, crop=config.crop, on_error="stop"
    )
    vae = None
    if config.vae is not None:
        vae = load_vae(config.vae, device, dtype=config.precision, channels=config.channels)
    text = None if config.text is None else _text_encoder(config, data, device)
    extractor = Extractor(
        data,
        size=config.size,
        channels=config.channels,
        vae=vae,
        text=text,
        shard_rows=config.shard_rows,
        batch_size=config.batch_size,
        flips=config.flips,
        dtype=config.dtype if config.layout == "shards" else "fp32",
        on_error=config.on_error,
        multi_scale=config.multi_scale,
        num_workers=config.num_workers,
    )
    folder, limit = Path(config.output), (config.start, config.end)
    if config.layout == "files":
        if not isinstance(data, FileDataset):
            raise ConfigError(f"layout=files names files after images; dataset={config.dataset} is not of image files.")
        summary = write_feature_files(extractor, data, folder, parallel, limit=limit)
    else:
        summary = extractor.run(folder, parallel, limit=limit)
    if parallel.is_main and isinstance(text, SmallTextEncoder):
        save_small_text(folder, text)
    return summary


def _text_encoder(config: ExtractConfig, data: ImageDataset, device: torch.device) -> TextEncoder:
    if config.text != "small":
        return load_text_encoder(config.text, device, length=config.text_length, dtype=config.precision)
    captions = data.captions(range(len(data)))
    if captions is None:
        raise ConfigError(f"text=small, but dataset={config.dataset} have no captions; set text=null.")
    return SmallTextEncoder.train(captions, length=config.text_length or 8)
