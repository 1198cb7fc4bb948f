"""Converts a hypernetwork between formats; any source that ``logah.checkpoints.load_hypernetwork`` accepts.

    python -m logah.convert ghn3tm8.pt out=ghn3-tiny                    safetensors and config.json
    python -m logah.convert checkpoint.pt out=logah heads=16            of the reference's trainer
    python -m logah.convert runs/logah-tiny out=tiny.pt to=reference    the reference's layout of one file

Options: ``--help``.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import cli
from common.config import require_choice
from common.errors import ConfigError
from common.positional import name_arguments
from logah.checkpoints import convert

FORMATS = ("quintet", "reference")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Options of ``python -m logah.convert``."""

    source: str  # run folder, exported folder, published file, or checkpoint of the reference's trainer
    out: str  # folder to be written; to=reference: a .pt file
    to: Literal["quintet", "reference"] = "quintet"
    ema: bool = True  # averaged weights, where the source has both
    variant: Literal["vision", "llm"] | None = None  # llm: gives a vision model the nodes and sizes of language models
    heads: int | None = None  # of files of the reference that do not say; null: 16 if wider than 64, else 8
    num_classes: int | None = None  # likewise; null: 10
    max_shape: list[int] | int | str | None = None  # likewise, low-rank only; null: rows of a factor / 16
    attention: Literal["explicit", "as_is"] | None = None  # likewise; null: explicit
    ve_cutoff: int | None = None  # likewise; null: 50
    normalisation: Literal["fan_in", "unit_std", "none"] | None = None  # null: by the variant
    overwrite: bool = False

    def __post_init__(self) -> None:
        require_choice("to", self.to, FORMATS)
        for name in ("source", "out"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; give a path.")
        if self.to == "reference" and Path(self.out).suffix not in (".pt", ".pth"):
            raise ConfigError(f"out={self.out}: to=reference writes one file; give a name that ends in .pt.")


def main() -> int:
    sys.argv[1:] = name_arguments(sys.argv[1:], "source", "out")
    return cli.run(run, "convert", ConvertConfig, "configs/logah", print_config=False)


def run(config: ConvertConfig) -> None:
    """Prints what was written."""
    print(
        convert(
            config.source,
            config.out,
            to=config.to,
            ema=config.ema,
            overwrite=config.overwrite,
            variant=config.variant,
            heads=config.heads,
            num_classes=config.num_classes,
            max_shape=config.max_shape,
            attention=config.attention,
            ve_cutoff=config.ve_cutoff,
            normalisation=config.normalisation,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
