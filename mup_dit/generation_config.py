"""Options of ``python -m mup_dit.sample``."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from common.config import PRECISIONS, require_at_least, require_choice
from common.errors import ConfigError
from mup_dit.image_files import FORMATS
from mup_dit.requests import LAYOUTS, NAMES
from mup_dit.sampling import SamplerConfig

COST_ONLY = {"output", "overwrite", "resume", "device", "progress", "grid", "compile"}
"""Options that do not decide an image's file."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Options of ``python -m mup_dit.sample``."""

    model_path: str  # run folder, exported folder, released .pt or .pth, or diffusers folder
    ema: bool = True  # averaged weights, where the model has both
    heads: int | None = None  # of released checkpoints, which do not say; null: width / 72
    base_shapes: str | None = None  # .bsh file of a muP checkpoint without a table
    output_mult: float | None = None  # of a released muP checkpoint that does not say; null: 1
    weak_model_path: str | None = None  # guide away from this poorer model instead of the null condition
    vae: str | None = None  # folder or hub name of the autoencoder; null: the one of the run, or none for pixels
    text_encoder: str | None = None  # folder or hub name; null: the one of the run
    device: str | None = None  # null: this process's GPU, else the CPU
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of the network; the sampler's state is float32
    compile: bool = False  # torch.compile the network

    labels: Any = "uniform"  # uniform, balanced, a class, a list, or a .json file
    prompts: Any = None  # a text, a list, or a .txt, .json or .jsonl file
    clean_captions: bool | None = None  # lower case, without markup and links; null: for T5, as it was trained on
    samples_per_prompt: int = 1
    num_samples: int | None = None  # null: 16, or all prompts
    batch_size: int = 32  # images at a time per process
    seed: int = 0

    size: list[int] | None = (
        None  # [height, width] in pixels, of a model with micro_conditions; null: prompts' --ar, or its own
    )

    sampling: SamplerConfig = field(default_factory=SamplerConfig)

    output: str = "samples"  # folder
    format: Literal["npz", "webdataset", "png", "jpg"] = "npz"
    shard_size: int = 1000  # webdataset: images per shard
    names: Literal["index", "prompt"] = "index"  # png, jpg: 000000.png, or the beginning of the prompt
    name_length: int = 100  # names=prompt: characters of it
    layout: Literal["flat", "geneval"] = "flat"  # geneval: a folder per prompt with its metadata
    rounding: Literal["auto", "truncate", "nearest"] = "auto"  # of pixels; auto: truncate for dit, nearest for text
    grid: int = 64  # images on grid.png; 0: no grid
    overwrite: bool = False  # replace an existing output
    resume: bool = False  # keep the images that an interrupted run wrote
    progress: bool = True

    def __post_init__(self) -> None:
        for name, choices in (
            ("precision", PRECISIONS), ("format", FORMATS), ("names", NAMES), ("layout", LAYOUTS),
            ("rounding", ("auto", "truncate", "nearest")),
        ):  # fmt: skip
            require_choice(name, getattr(self, name), choices)
        for name in ("batch_size", "samples_per_prompt", "shard_size", "name_length"):
            require_at_least(name, getattr(self, name), 1)
        require_at_least("grid", self.grid, 0)
        require_at_least("seed", self.seed, 0)
        if self.num_samples is not None:
            require_at_least("num_samples", self.num_samples, 1)
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ConfigError(f"size={self.size} must be two numbers, [height, width] in pixels.")
        if not self.output:
            raise ConfigError("output is empty; give a folder, for example output=runs/first/samples.")
        if self.overwrite and self.resume:
            raise ConfigError("overwrite=true and resume=true contradict each other; set one of them.")
        if self.layout == "geneval" and (self.format not in ("png", "jpg") or self.prompts is None):
            raise ConfigError("layout=geneval writes image files of prompts; set format=png and prompts=FILE.jsonl.")
        if self.names == "prompt" and (self.format not in ("png", "jpg") or self.prompts is None):
            raise ConfigError("names=prompt names image files; set format=jpg (or png) and prompts=FILE.")

    def settings(self) -> str:
        """Digest of everything that decides the files."""
        decisive = {name: value for name, value in asdict(self).items() if name not in COST_ONLY}
        return hashlib.sha256(json.dumps(decisive, default=str, sort_keys=True).encode()).hexdigest()[:16]
