"""Traces a network to the graph that a hypernetwork reads; shows, writes and draws it.

    python -m logah.graph resnet50
    python -m logah.graph model=gpt2-large graph_version=v2 show_nodes=true
    python -m logah.graph vit_s_cifar output=vit.json drawing=vit.pdf
    python -m logah.graph vit.json drawing=vit.png labels=false

``model=NAME`` and ``target=NAME`` are the same. Options: ``--help``.
"""

import sys

from common import cli
from common.positional import name_arguments
from common.report.tables import print_tables
from logah.graph_config import GraphConfig
from logah.graph_report import report_graph


def main() -> int:
    """The command line."""
    arguments = [one.removeprefix("model=") if one.startswith("model=") else one for one in sys.argv[1:]]
    arguments = [f"target='{one}'" if "?" in one and "=" not in one.split("?")[0] else one for one in arguments]
    sys.argv[1:] = name_arguments(arguments, "target")
    return cli.run(run, "graph", GraphConfig, "configs/logah", print_config=False)


def run(config: GraphConfig) -> int:
    """Reports as configured."""
    _, tables = report_graph(config)
    print_tables(tables)
    for name in (config.output, config.drawing):
        if name is not None:
            print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
