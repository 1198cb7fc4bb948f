"""One self-contained HTML page of any run folder.

    python -m common.report runs/radd-small                       writes runs/radd-small/report.html
    python -m common.report runs/radd-small --output page.html
    python -m common.report run_dir=runs/radd-small output=page.html

A page of ours is refreshed; any other file at the output's place is kept unless --force is given.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError
from common.report.command import exit_code
from common.report.page import write_page
from common.report.run_folder import run_page


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options from the command line; ``name=value`` is accepted as in the training commands."""
    description, _, usage = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m common.report",
        description=description,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", nargs="+", metavar="RUN_DIR", help="folder with metrics.jsonl; also run_dir=FOLDER")
    parser.add_argument("--output", help="HTML file to write (default: RUN_DIR/report.html); also output=FILE")
    parser.add_argument("--force", action="store_true", help="replace a file that is not a report of ours")
    found = parser.parse_args(arguments)
    values, folders = {"output": found.output}, []
    for word in found.run_dir:
        name, separator, value = word.partition("=")
        if separator and name in ("run_dir", "output"):
            if name == "output":
                values["output"] = value
            else:
                folders.append(value)
        else:
            folders.append(word)
    if len(folders) != 1:
        raise ConfigError(f"run_dir={' '.join(folders) or 'nothing'}: name exactly one run folder.")
    found.run_dir = folders[0]
    found.output = values["output"] or str(Path(folders[0]) / "report.html")
    return found


def main() -> int:
    options = parse()
    page = run_page(Path(options.run_dir))
    print(f"report: {write_page(Path(options.output), page, force=options.force)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
