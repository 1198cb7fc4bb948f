"""How different the layers of predicted (or any) networks are, after matching their rows.

    python -m logah.similarity networks=[runs/prediction]
    python -m logah.similarity networks=[runs/logah_vit,runs/ghn3_vit] shapes=[[384,384],[1536,384]] output=report.json

Options: ``--help``.
"""

import sys

from common import cli
from common.report.tables import print_tables
from logah.network_similarity import SimilarityConfig, compare_networks, diversity_table


def main() -> int:
    return cli.run(run, "similarity", SimilarityConfig, "configs/logah", print_config=False)


def run(config: SimilarityConfig) -> None:
    print_tables([diversity_table(compare_networks(config))])


if __name__ == "__main__":
    sys.exit(main())
