"""Looks at a folder of checkpoints before a generator is trained on it; writes nothing.

    python -m rpg.check DIR
    python -m rpg.check DIR data.dim_per_token=128 data.condition=class output=report.json

Options: ``--help``. Exit code 2: a file cannot be used.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from common import cli
from common.errors import DataError
from common.positional import name_arguments
from common.report.page import write_atomically
from common.report.tables import print_tables
from rpg.checking import check_folder
from rpg.data import DataSection


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    data: DataSection = field(default_factory=DataSection)
    output: str | None = None  # JSON file with everything that is printed
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.output is not None and Path(self.output).exists() and not self.overwrite:
            raise DataError(f"output={self.output} exists; add overwrite=true, or choose another file.")


def main() -> int:
    sys.argv[1:] = name_arguments(sys.argv[1:], "data.checkpoints")
    return cli.run(run, "check", CheckConfig, "configs/rpg", print_config=False)


def run(config: CheckConfig) -> int:
    """Prints the report; 2 if there is a problem."""
    report = check_folder(config.data)
    print_tables(report.tables, f"{config.data.checkpoints}")
    for note in report.notes:
        print(f"note: {note}")
    for problem in report.problems:
        print(f"problem: {problem}")
    count = len(report.problems)
    print(f"{count} problem{'' if count == 1 else 's'}" if count else "no problem: a generator can be trained on these")
    if config.output is not None:
        write_atomically(Path(config.output), json.dumps(report.to_json(), indent=1).encode())
    return cli.EXIT_USAGE if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
