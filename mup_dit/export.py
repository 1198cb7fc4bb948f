"""Converts a model between formats; any source that ``mup_dit.loading.load_model`` accepts.

    python -m mup_dit.export model_path=runs/first output=exported                         safetensors and config.json
    python -m mup_dit.export model_path=runs/first output=plain to=diffusers               an ordinary DiT of diffusers
    python -m mup_dit.export model_path=DiT-XL-2-256x256.pt output=imported
    python -m mup_dit.export model_path=0400000.pt base_shapes=width288_d28.bsh output=for_dit to=reference

``to=diffusers`` and ``fold=true`` move the readout's multiplier into its weight: the result is an ordinary network of
equal outputs, which cannot be trained on by muP.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from common import cli
from common.config import require_at_least, require_choice
from common.errors import ConfigError
from mup_dit.encoders import DTYPES
from mup_dit.loading import LoadedModel, load_model
from mup_dit.parametrization import fold
from mup_dit.saving import check_output, save_diffusers, save_model, save_reference

FORMATS = ("quintet", "diffusers", "reference")
CONFIG_DIR = "configs/mup_dit"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Options of ``python -m mup_dit.export``."""

    model_path: str  # run folder, model folder, .pt, .pth, diffusers' folder or hub name
    output: str  # folder to be written
    to: Literal["quintet", "diffusers", "reference"] = "quintet"
    fold: bool = False  # move multipliers into the weights; to=diffusers always does
    heads: int | None = None  # of a .pt or .pth, which do not tell
    base_shapes: str | None = None  # of a .pt or .pth trained by muP: .bsh file, or auto (4 heads)
    output_mult: float | None = None  # of such a file; null: stored, or 1
    ema: bool = True  # the averaged weights, where both are stored
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the written weights
    overwrite: bool = False  # replace a model that is there

    def __post_init__(self) -> None:
        require_choice("to", self.to, FORMATS)
        require_choice("dtype", self.dtype, tuple(DTYPES))
        for name in ("model_path", "output"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; give a path.")
        if self.heads is not None:
            require_at_least("heads", self.heads, 1)


def main() -> int:
    """The command line."""
    return cli.run(export, "export", ExportConfig, CONFIG_DIR, print_config=False)


def export(config: ExportConfig) -> int:
    """Writes the model as configured and prints the folder."""
    output = Path(config.output)
    check_output(output, config.overwrite)  # before gigabytes are read
    loaded = load_model(
        config.model_path,
        use_ema=config.ema,
        heads=config.heads,
        base_shapes=config.base_shapes,
        output_mult=config.output_mult,
    )
    loaded.model.to(DTYPES[config.dtype])
    if config.to == "diffusers":
        save_diffusers(output, loaded.model, overwrite=config.overwrite)
    elif config.to == "reference":
        save_reference(output, loaded.model, loaded.config, overwrite=config.overwrite, folded=config.fold)
    else:
        loaded = _folded(loaded) if config.fold else loaded
        metadata = {**loaded.metadata, "source": Path(loaded.source).name}
        save_model(output, loaded.model, loaded.config, metadata=metadata, overwrite=config.overwrite)
    print(output)
    return 0


def _folded(loaded: LoadedModel) -> LoadedModel:
    """The model as an ordinary network."""
    network = replace(loaded.config.network, output_mult=1.0)
    plain = replace(loaded.config, parametrization="sp", base_shapes=None, network=network)
    return replace(loaded, model=fold(loaded.model), config=plain)


if __name__ == "__main__":
    sys.exit(main())
