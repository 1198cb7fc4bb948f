"""Coordinate check: do activations keep their size while the width grows? Exit code 1 for a model that is not muP.

    python -m mup_dit.coord_check model=dit-digits                              half a minute on a laptop: passes
    python -m mup_dit.coord_check model=dit-digits model.parametrization=sp output=runs/sp                fails
    python -m mup_dit.coord_check model=dit-xl-2 data=noise heads=[1,4,7,10,13,16,19] batch_size=16 device=cuda

The output folder holds records.csv, slopes.csv, coordinates.png and verdict.json.
"""

import sys
from pathlib import Path

from common import cli
from mup_dit.coordinate_check import CoordCheckConfig, run_check, write_check

CONFIG_DIR = "configs/mup_dit"


def main() -> int:
    """The command line."""
    return cli.run(check, "coord_check", CoordCheckConfig, CONFIG_DIR)


def check(config: CoordCheckConfig) -> int:
    """Checks as configured.

    Returns: 0 if the network is muP, else 1.
    """
    found, verdict = run_check(config)
    files = write_check(Path(config.output), config, found, verdict)
    steepest = verdict.steepest
    where = "nothing measurable" if steepest is None else (
        f"steepest slope {steepest.slope:+.3f} ({steepest.module or 'output'}, step {steepest.step})"
    )  # fmt: skip
    print(f"{'PASS' if verdict.passed else 'FAIL'}: {where}, limit {verdict.limit:g}; {files[2]}")
    return 0 if verdict.passed else 1


if __name__ == "__main__":
    sys.exit(main())
