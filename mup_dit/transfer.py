"""Tune small, train large: a learning-rate x width sweep, its figure, the rate for the target and what tuning costs.

    python -m mup_dit.transfer run_dir=runs/sweep                             three minutes on a laptop, no download
    OMP_NUM_THREADS=1 python -m mup_dit.transfer run_dir=runs/sweep launcher=joblib hydra.launcher.n_jobs=2
    python -m mup_dit.transfer heads=2,4,8 mup.loglr=-12,-11,-10,-9,-8 model=dit-xl-2 data=features \\
        data.train=features:DIR data.valid=features:DIR launcher=slurm parallel=ddp hydra.launcher.partition=gpu
    python -m mup_dit.transfer model=mmdit-digits data=digits-captions objective=flow heads=2 mup.loglr=null \\
        trial='range(20)' training.n_iters=200                            random search instead of a grid

The sweep folder holds one folder a run, runs.csv, transfer.csv, transfer.json and transfer.png. The same command again
continues what was stopped and skips what is finished. Other options can be swept as well (training.batch_size=128,256):
every combination gets its own panel.
"""

import sys

from common import cli
from common.report import print_tables
from common.report.command import exit_code
from mup_dit import transfer_run
from mup_dit.transfer_config import SweptOptions, TransferConfig
from mup_dit.transfer_report import make_report

CONFIG_DIR = "configs/mup_dit"


def main() -> int:
    """The command line: all runs, by Hydra's launcher, and then the report."""
    SweptOptions.of_sweep = None
    cli.run(transfer_run.run, "transfer", TransferConfig, CONFIG_DIR, print_config=False)
    if SweptOptions.of_sweep is None:  # --help, --cfg
        return 0
    return exit_code(report)


def report() -> int:
    """Prints what the sweep says.

    Returns: 0, or ``cli.EXIT_REQUEUE`` if runs were stopped by a signal.
    """
    found = make_report(cli.from_config(TransferConfig, SweptOptions.of_sweep))
    print_tables(found.tables)
    for line in found.lines:
        print(line)
    print(f"{found.folder / 'transfer.json'}, {found.folder / 'runs.csv'}")
    return cli.EXIT_REQUEUE if found.unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
