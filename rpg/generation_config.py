"""Options of ``python -m rpg.generate``."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from common.config import PRECISIONS, require_at_least, require_choice
from common.errors import ConfigError
from rpg.checkpoint_files import FORMATS
from rpg.sampling import SamplerConfig
from rpg.testing import TesterSection

COST_ONLY = {"output", "overwrite", "append", "device", "rows_per_pass", "test", "tester", "progress", "format", "tag"}
"""Options that do not decide a network's values."""

CONDITION_OPTIONS = ("tasks", "vectors", "images", "texts", "features")


@dataclass(frozen=True, kw_only=True)
class SamplingOverrides:
    """Options of the sampler; null keeps that of the run."""

    kind: str | None = None  # trailing|ddpm|ddim|dpm_solver_sde|heun
    steps: int | None = None  # network evaluations, but heun needs two a step and ddpm takes all
    eta: float | None = None  # share of fresh noise of trailing and ddim
    grid: str | None = None  # linear|quadratic, of ddim
    churn: float | None = None  # of heun
    padding: str | None = None  # zero or free
    guidance: float | None = None  # classifier-free guidance; 1: none

    def over(self, sampler: SamplerConfig) -> SamplerConfig:
        """``sampler`` with what is set here."""
        return replace(sampler, **{name: value for name, value in asdict(self).items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Options of ``python -m rpg.generate``."""

    generator: str  # run folder, exported folder, or released .pth
    structure: str | None = None  # of a released .pth: its structure.cache; null: the one beside it
    num_heads: int | None = None  # of a released transformer
    ema: bool = True  # averaged weights, where the generator has both
    device: str | None = None  # null: this process's GPU, else the CPU
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"  # of the network; the sampler's state is float32

    num_generated: int | None = None  # networks, per condition; null: 10, or 1 per condition
    states: Any = "auto"  # permutation states: auto|random|balanced|none, numbers or names of groups
    seed: int = 0

    tasks: Any = None  # class vectors of tasks: unseen, seen, 793 or [793,101]
    num_tasks: int | None = None  # so many of the seen (null: 20) or unseen (null: all held out)
    vectors: Any = None  # conditions written out: [0,0,1,...] or a list of such lists
    images: Any = None  # example images: files of one condition, a folder, or a list of folders, one condition each
    texts: Any = None  # sentences, one condition each
    features: str | None = None  # JSON {label: [numbers]}, as rpg.extract_conditions writes it
    encoder: str | None = None  # of images: digits, timm:NAME, or a transformers model; of texts: a transformers model

    sampling: SamplingOverrides = field(default_factory=SamplingOverrides)
    rows_per_pass: int = 512  # tokens in the denoiser at a time; larger: faster, more memory

    output: str = "generated"  # folder
    format: Literal["pth", "safetensors", "peft"] = "pth"
    tag: str | None = None  # in file names; null: the generator's
    overwrite: bool = False  # replace networks of the same names
    append: bool = False  # go on with the next free numbers
    test: bool = False  # test each network, by the run's tester or the one below
    tester: TesterSection = field(default_factory=TesterSection)
    progress: bool = True

    def __post_init__(self) -> None:
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("format", self.format, FORMATS)
        require_at_least("seed", self.seed, 0)
        require_at_least("rows_per_pass", self.rows_per_pass, 1)
        for name in ("num_generated", "num_tasks"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        for name in ("generator", "output"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; give a path.")
        if self.overwrite and self.append:
            raise ConfigError("overwrite=true and append=true contradict each other; set one of them.")
        if self.tag is not None and (not self.tag or any(letter in self.tag for letter in "/\\\0")):
            raise ConfigError(f"tag={self.tag!r} is a part of file names; use letters, digits and underscores.")
        given = [name for name in CONDITION_OPTIONS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} are different conditions; give one of them.")
        if (self.images is not None or self.texts is not None) and not self.encoder:
            raise ConfigError(
                f"{given[0]} needs the encoder that the generator's conditions were made with; set encoder=NAME."
            )

    def settings(self) -> str:
        """Digest of everything that decides the networks' values."""
        decisive = {name: value for name, value in asdict(self).items() if name not in COST_ONLY}
        return hashlib.sha256(json.dumps(decisive, default=str, sort_keys=True).encode()).hexdigest()
