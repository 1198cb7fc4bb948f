"""Converts a RADD model between formats; any source that ``radd.loading.load_model`` accepts.

    python -m radd.export model_path=runs/first output=exported                    safetensors and nested config.json
    python -m radd.export model_path=runs/first output=first.pth to=pth            the reference's checkpoint file
    python -m radd.export model_path=runs/first output=reference_run to=run        the reference's run folder
    python -m radd.export model_path=../reference/exp/run/checkpoints-meta/checkpoint.pth output=imported

The reference's ``load_model`` reads the first and the third. The moving average is exported (``ema=false``: the plain
weights); ``.pth`` files hold both where the source has both.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import cli
from common.config import require_choice
from common.data.tokenizer import Tokenizer
from common.errors import ConfigError
from radd.loading import load_model, save_reference_checkpoint, save_reference_folder, save_reference_run

FORMATS = ("folder", "pth", "run")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Options of ``python -m radd.export``."""

    model_path: str  # run folder, exported folder, the reference's .pth or run folder, or hub name
    output: str  # folder, or file for to=pth
    to: Literal["folder", "pth", "run"] = "folder"
    ema: bool = True  # the averaged weights, where the model has both
    tokenizer: bool = True  # to=folder: also the tokenizer's files, where it can be loaded
    overwrite: bool = False  # replace a model that is there

    def __post_init__(self) -> None:
        require_choice("to", self.to, FORMATS)
        for name in ("model_path", "output"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; give a path.")
        if self.to == "pth" and Path(self.output).suffix not in (".pth", ".pt"):
            raise ConfigError(f"output={self.output} with to=pth must end in .pth; to=run writes a whole run folder.")


def main() -> int:
    """The command line."""
    return cli.run(export, "export", ExportConfig, print_config=False)


def export(config: ExportConfig) -> int:
    """Loads and writes; prints where."""
    loaded = load_model(config.model_path, ema=config.ema)
    if config.to == "folder":
        tokenizer: Tokenizer | None = loaded.tokenizer if config.tokenizer else None
        save_reference_folder(
            config.output,
            loaded.model,
            loaded.config,
            schedule=loaded.schedule,
            tokenizer=tokenizer,
            overwrite=config.overwrite,
        )
    else:
        plain = load_model(config.model_path, ema=False).model.state_dict() if config.ema else None
        if config.to == "run":
            save_reference_run(config.output, loaded, plain, overwrite=config.overwrite)
        else:
            averages = loaded.model.state_dict()
            save_reference_checkpoint(config.output, plain or averages, averages, overwrite=config.overwrite)
    print(config.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
