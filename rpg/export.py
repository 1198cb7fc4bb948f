"""Converts a generator between formats; any source that ``rpg.loading.load_generator`` accepts.

python -m rpg.export generator=runs/first output=exported                    one folder with all that is needed
python -m rpg.export generator=generalization.pth structure=structure.cache output=imported
python -m rpg.export generator=runs/first output=first.pth to=reference      the released layout of one file
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import cli
from common.config import require_choice
from common.errors import ConfigError
from rpg.loading import load_generator
from rpg.saving import check_output, save_generator, save_reference

FORMATS = ("quintet", "reference")
TABLES = ("ddpm", "ddim")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Options of ``python -m rpg.export``."""

    generator: str  # run folder, exported folder, or released .pth
    output: str  # folder to be written; to=reference: a .pth file
    to: Literal["quintet", "reference"] = "quintet"
    structure: str | None = None  # of a released .pth: its structure.cache; null: the one beside it
    num_heads: int | None = None  # of a released transformer
    ema: bool = True  # averaged weights, where the generator has both
    sampler: Literal["ddpm", "ddim"] = "ddpm"  # to=reference: whose tables the file holds
    overwrite: bool = False  # replace a generator that is there

    def __post_init__(self) -> None:
        require_choice("to", self.to, FORMATS)
        require_choice("sampler", self.sampler, TABLES)
        for name in ("generator", "output"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; give a path.")
        if self.to == "reference" and Path(self.output).suffix != ".pth":
            raise ConfigError(f"output={self.output}: to=reference writes one file; give a name that ends in .pth.")


def export(config: ExportConfig) -> int:
    """Writes the generator as configured and prints where."""
    output = Path(config.output)
    if config.to == "quintet":
        check_output(output, config.overwrite)  # before gigabytes are read
    loaded = load_generator(
        config.generator, use_ema=config.ema, structure=config.structure, num_heads=config.num_heads
    )
    if config.to == "reference":
        save_reference(output, loaded.model, sampler=config.sampler, overwrite=config.overwrite)
    else:
        metadata = {**loaded.metadata, "source": Path(loaded.source).name}
        save_generator(output, loaded.model, loaded.codec, loaded.facts, metadata, overwrite=config.overwrite)
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(export, "export", ExportConfig, "configs/rpg", print_config=False))
