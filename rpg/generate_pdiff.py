"""Draws networks from a run of ``rpg.train_pdiff``; files are numbered and never overwritten unasked.

python -m rpg.generate_pdiff generator=runs/pdiff num_generated=10 output=networks test=true
python -m rpg.generate_pdiff generator=runs/pdiff num_generated=200 output=networks sampling.kind=ddpm append=true
"""

import sys

from common import cli
from rpg.pdiff_config import PdiffGenerateConfig
from rpg.pdiff_generation import mean_accuracy, run_generation

CONFIG_DIR = "configs/rpg"


def main() -> int:
    """The command line."""
    return cli.run(generate, "generate_pdiff", PdiffGenerateConfig, CONFIG_DIR)


def generate(config: PdiffGenerateConfig) -> int:
    """Draws, writes and tests networks."""
    records = run_generation(config)
    for record in records:
        tested = "".join(f"  {name} {record[name]}" for name in ("accuracy", "loss", "error") if name in record)
        print(f"{config.output}/{record['file']}{tested}")
    if (accuracy := mean_accuracy(records)) is not None:
        mean, error = accuracy
        print(f"accuracy {mean:.4f} +- {error:.4f} (standard error over {len(records)} networks)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
