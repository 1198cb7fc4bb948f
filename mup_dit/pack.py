"""Packs a folder of PNG files 000000.png, 000001.png, ... into one .npz with ``arr_0``, as the ADM evaluation reads it.

    python -m mup_dit.pack folder=samples/step_50000 count=50000

Options: ``--help``.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from common.cli import run
from common.config import require_at_least
from common.errors import ConfigError
from mup_dit.image_files import pack_folder


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    folder: str
    output: str | None = None  # .npz file; null: beside the folder, with its name
    count: int = 50_000  # images
    overwrite: bool = False

    def __post_init__(self) -> None:
        require_at_least("count", self.count, 1)
        if not self.folder:
            raise ConfigError("folder is empty; give the folder that holds 000000.png.")

    @property
    def path(self) -> Path:
        """The file to be written."""
        return Path(self.output) if self.output else Path(self.folder.rstrip("/") + ".npz")


def main(config: PackConfig) -> None:
    if config.path.exists() and not config.overwrite:
        raise ConfigError(f"output={config.path} exists; use overwrite=true, or another file.")
    surplus = pack_folder(Path(config.folder), config.path, config.count)
    note = f"; {surplus} further images were left out" if surplus else ""
    print(f"{config.count} images in {config.path}{note}")


if __name__ == "__main__":
    sys.exit(run(main, "pack", PackConfig, "configs/mup_dit", print_config=False))
