"""The quickstart's page: every paper's reproduction that exists, on one self-contained HTML page and on the terminal.

python -m common.report.quickstart runs/quickstart
"""

import argparse
import sys
from pathlib import Path

from common.errors import DataError
from common.report.command import exit_code
from common.report.page import Page, Section, write_page
from common.report.section_folder import RESULTS, load_section
from common.report.tables import Table, checks_table, print_tables


def collect(folder: Path) -> list[tuple[str, Section]]:
    """(paper, section) for every sub-folder with a result, by name; a damaged one becomes a section that says so.

    Raises: DataError if there is none.
    """
    found = []
    for path in sorted(Path(folder).glob(f"*/{RESULTS}")):
        try:
            found.append((path.parent.name, load_section(path.parent)))
        except DataError as error:
            print(f"quickstart: {error}", file=sys.stderr)
            found.append((path.parent.name, Section(title=path.parent.name, text=str(error))))
    if not found:
        raise DataError(f"{folder} holds no reproduction (no */{RESULTS}); run bash scripts/quickstart.sh first.")
    return found


def overview(found: list[tuple[str, Section]]) -> Table:
    """Papers, checks passed, checks in all."""
    rows = []
    for paper, section in found:
        good = sum(check.passed for check in section.checks)
        complete = bool(section.checks) and section.passed
        rows.append([paper, f"{good} of {len(section.checks)} checks", complete, section.facts.get("duration", "–")])
    return Table(name="overview", columns=["paper", "checks passed", "result", "duration"], rows=rows)


def build_page(found: list[tuple[str, Section]]) -> Page:
    """The combined page: an overview, then one section per paper."""
    summary = Section(title="Overview", tables=[overview(found)])
    return Page(
        title="Quintet: small reproductions",
        text="Every number on this page was computed on this machine from data embedded in Python, without a download.",
        sections=[summary, *(section for _, section in found)],
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m common.report.quickstart", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with one sub-folder per paper")
    folder = parser.parse_args().folder
    found = collect(folder)
    for paper, section in found:
        print_tables([checks_table(section.checks)], title=f"{paper}: {section.title}")
    print_tables([overview(found)])
    print(f"quickstart: report {write_page(folder / 'report.html', build_page(found))}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
