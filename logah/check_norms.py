"""Compares total norms of predicted networks with published ones: was a released hypernetwork read as it should be?

    python -m logah.check_norms checkpoint=ghn3tm8.pt results=ghn3_results.json column=ghn3-t limit=5
    python -m logah.check_norms checkpoint=runs/logah/export targets=[resnet18,vit_s_cifar]
    python -m logah.check_norms predictions=[runs/prediction]

Options: ``--help``. Exit code 1: a norm differs by more than ``tolerance``.
"""

import sys

from common import cli
from common.report.tables import print_tables
from logah.param_norms import CheckNormsConfig, check_norms, norms_table


def main() -> int:
    return cli.run(run, "check_norms", CheckNormsConfig, "configs/logah", print_config=False)


def run(config: CheckNormsConfig) -> int:
    rows = check_norms(config)
    print_tables([norms_table(rows)])
    differing = [row.name for row in rows if row.agrees is False]
    compared = sum(row.published is not None for row in rows)
    print(f"{compared - len(differing)} of {compared} norms agree within {config.tolerance:g}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
