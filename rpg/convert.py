"""Converts checkpoints: wrappers of detection and segmentation frameworks, adapters of ``peft`` and of the DoRA fork.

    python -m rpg.convert vitdet.pth plain.pth ignore_objects=true
    python -m rpg.convert GENERATED_DIR WRAPPED_DIR to=wrapped template=vitdet.pth
    python -m rpg.convert FORK_ADAPTERS PEFT_ADAPTERS to=peft

Options: ``--help``.
"""

import sys
from dataclasses import dataclass
from typing import Literal

from common import cli
from common.config import require_choice
from common.errors import ConfigError
from common.positional import name_arguments
from rpg.wrappers import TARGETS, convert


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    input: str  # file, adapter's folder, or folder of either
    output: str  # file for a file, folder for a folder
    to: Literal["plain", "wrapped", "peft", "fork"] = "plain"
    format: Literal["pth", "safetensors"] = "pth"  # of plain files
    template: str | None = None  # to=wrapped: an original wrapped file, whose other entries are taken over
    ignore_objects: bool = False  # leave out objects of unknown classes instead of refusing the file
    overwrite: bool = False

    def __post_init__(self) -> None:
        require_choice("to", self.to, TARGETS)
        if self.template is not None and self.to != "wrapped":
            raise ConfigError(f"template={self.template} has a use with to=wrapped only; remove it.")


def main() -> int:
    sys.argv[1:] = name_arguments(sys.argv[1:], "input", "output")
    return cli.run(run, "convert", ConvertConfig, "configs/rpg", print_config=False)


def run(config: ConvertConfig) -> None:
    """Prints what was written."""
    written = convert(
        config.input,
        config.output,
        config.to,
        suffix=f".{config.format}",
        template=config.template,
        ignore_objects=config.ignore_objects,
        overwrite=config.overwrite,
    )
    for path in written:
        print(path)


if __name__ == "__main__":
    sys.exit(main())
