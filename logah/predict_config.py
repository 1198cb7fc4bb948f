"""Options of ``python -m logah.predict``."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from common.config import require_at_least, require_choice
from common.errors import ConfigError
from logah.model_config import ATTENTIONS, GRAPH_VERSIONS, NORMALISATIONS
from logah.shard_writer import GIGABYTE
from logah.streaming import StreamOptions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Options of ``python -m logah.predict``."""

    target: (
        Any  # network: a name, NAME?option=value, torchvision:NAME, timm:NAME, a folder or JSON with a configuration
    )
    checkpoint: str  # run folder, exported folder, or a file of a reference implementation
    out: str  # folder; it appears whole or not at all
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the stored numbers; they are decoded in float32
    shard_gb: float = 5.0  # most gigabytes of weights in one file
    seed: int = 0  # of what is not predicted, and of all that is drawn below
    strict: bool = False  # refuse networks of which something is not predicted
    overwrite: bool = False  # replace a prediction that is there
    device: str | None = None  # of the hypernetwork; null: this machine's GPU, else the CPU
    ema: bool = True  # averaged weights, where the checkpoint has both
    progress: bool = True

    predict_class_layers: bool = True  # false: the class head keeps its initial values
    reinit_residual: bool = False  # c_proj, o_proj drawn from N(0, 0.02^2 / 2 blocks), as released for GPT-2
    orthogonalise: bool = False  # matrices made orthogonal
    noise: float = 0.0  # breaks symmetries between rows: share of their spread; 1e-5 is usual for GHN-3
    class_token_noise: float | None = None  # deviation of the class token's position; null: the checkpoint's

    # what the hypernetwork was trained with; null: as its configuration says. Files of reference implementations do not
    # say it, checkpoints of ours refuse another value of the first three
    attention: str | None = None  # explicit|as_is
    graph_version: str | None = None  # reference|v2
    ve_cutoff: int | None = None  # longest path that is a virtual edge
    normalisation: str | None = None  # auto|fan_in|unit_std|none
    residual_scale: bool | None = None  # unit_std: c_proj and o_proj divided by sqrt(2 blocks)
    variant: str | None = None  # vision|llm

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, tuple(DTYPES))
        require_at_least("seed", self.seed, 0)
        choices = {
            "attention": ATTENTIONS,
            "graph_version": GRAPH_VERSIONS,
            "normalisation": ("auto", *NORMALISATIONS),
            "variant": ("vision", "llm"),
        }
        for name, known in choices.items():
            if getattr(self, name) is not None:
                require_choice(name, getattr(self, name), known)
        if not self.shard_gb > 0:
            raise ConfigError(f"shard_gb={self.shard_gb} must be above 0; 5 is what transformers writes.")
        for name in ("noise", "class_token_noise"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)} is a deviation and must be at least 0.")
        if not self.out:
            raise ConfigError("out is empty; give the folder for the weights, for example out=predictions/gpt2.")

    def stream_options(self) -> StreamOptions:
        """What streaming needs to know."""
        return StreamOptions(
            dtype=DTYPES[self.dtype],
            max_shard_bytes=max(1, round(self.shard_gb * GIGABYTE)),
            seed=self.seed,
            strict=self.strict,
            predict_class_layers=self.predict_class_layers,
            reinit_residual=self.reinit_residual,
            orthogonalise=self.orthogonalise,
            noise=self.noise,
        )

    def overrides(self) -> dict[str, Any]:
        """Options of the hypernetwork that were given."""
        names = (
            "attention",
            "graph_version",
            "ve_cutoff",
            "normalisation",
            "residual_scale",
            "variant",
            "class_token_noise",
        )
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
