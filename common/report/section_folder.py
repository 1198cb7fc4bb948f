"""A section on disk: ``results.json``, a CSV per table, two PNG per figure and ``section.html``; what a paper's
``reproduce.py`` leaves behind and the quickstart's page is made of.

``results.json`` names the files and holds the tables as data, so that a page can be rendered again without trusting
stored HTML.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from common.errors import ConfigError, DataError
from common.report.curves import Figure
from common.report.page import GENERATOR, Page, Section, pretty_json, render_page, write_atomically
from common.report.tables import Check, Table, checks_table

RESULTS = "results.json"
HTML = "section.html"


def holds_section(folder: Path) -> bool:
    """Whether ``folder`` holds a section that this module wrote."""
    try:
        found = json.loads((Path(folder) / RESULTS).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("generator") == GENERATOR


def save_section(folder: Path, section: Section, *, values: Mapping[str, object] | None = None) -> Path:
    """Writes the section; a section of ours in the same folder is refreshed, other files stay untouched.

    Args:
        folder: created if missing.
        values: raw results to keep under "values" in ``results.json`` (seed, configuration, numbers).

    Raises: ConfigError if a file of the section's would replace one that this module did not write.
    """
    folder = Path(folder)
    files: dict[str, bytes] = {}
    for table in section.tables:
        files[f"{table.name}.csv"] = table.to_csv().encode()
    if section.checks:
        files["checks.csv"] = checks_table(section.checks).to_csv().encode()
    for figure in section.figures:
        files[f"{figure.name}.png"] = figure.light_png
        files[f"{figure.name}-dark.png"] = figure.dark_png
    files[HTML] = render_page(Page(title=section.title, sections=[section])).encode()
    results = {
        "generator": GENERATOR,
        "title": section.title,
        "passed": section.passed,
        "text": section.text,
        "checks": [asdict(check) for check in section.checks],
        "tables": [asdict(table) for table in section.tables],
        "figures": [{"name": figure.name, "caption": figure.caption} for figure in section.figures],
        "facts": dict(section.facts),
        "listings": dict(section.listings),
        "values": dict(values or {}),
    }
    occupied = [] if holds_section(folder) else [name for name in [RESULTS, *files] if (folder / name).exists()]
    if occupied:
        raise ConfigError(
            f"output={folder} already holds {', '.join(occupied)}, not written by a reproduction; they stay as they "
            "are. Choose an empty folder."
        )
    for name, content in files.items():
        write_atomically(folder / name, content)
    write_atomically(folder / RESULTS, (pretty_json(results) + "\n").encode())  # last: it names the other files
    return folder


def load_section(folder: Path) -> Section:
    """The section that ``save_section`` wrote.

    Raises: DataError if a file is missing or damaged, with its name.
    """
    folder = Path(folder)
    path = folder / RESULTS
    try:
        found = json.loads(path.read_text())
        figures = []
        for figure in found["figures"]:
            path = folder / f"{figure['name']}.png"
            light = path.read_bytes()
            path = folder / f"{figure['name']}-dark.png"
            figures.append(Figure(figure["name"], figure["caption"], light, path.read_bytes()))
        path = folder / RESULTS
        return Section(
            title=found["title"],
            text=found["text"],
            checks=[Check(**check) for check in found["checks"]],
            tables=[Table(**table) for table in found["tables"]],
            figures=figures,
            facts=found["facts"],
            listings=found["listings"],
        )
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); run the reproduction again.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a reproduction's result ({error!r}); run the reproduction again.") from error
