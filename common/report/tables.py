"""Tables of a report: one description, written as HTML, CSV, Markdown or to the terminal."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from numbers import Integral, Real

PASS, FAIL = "PASS", "FAIL"
Cell = str | float | int | bool | None


def format_number(value: object, digits: int = 4) -> str:
    """A cell as a reader wants it: ``digits`` significant digits, thousands separated, PASS/FAIL for truth values."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return PASS if value else FAIL
    if isinstance(value, Integral):
        return f"{int(value):,}"
    if isinstance(value, Real):
        number = float(value)
        if not math.isfinite(number):
            return str(number)
        if number == 0:
            return "0"
        if abs(number) >= 10**9 or abs(number) < 1e-4:
            return f"{number:.{digits - 1}e}"
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(number))))
        return f"{number:,.{decimals}f}"
    return str(value)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under named columns.

    Attributes:
        name: file name of the CSV, without suffix.
        rows: numbers stay numbers (CSV keeps every digit), strings are shown as they are.
        caption: what the reader should look at; plain text.
        digits: significant digits of numbers, except in CSV.
    """

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    digits: int = 4

    def __post_init__(self) -> None:
        for row in self.rows:
            assert len(row) == len(self.columns), f"table {self.name}: row {row} under columns {self.columns}"

    def formatted(self) -> list[list[str]]:
        """Every cell as text."""
        return [[format_number(cell, self.digits) for cell in row] for row in self.rows]

    def to_html(self) -> str:
        """An HTML ``<table>``; every cell is escaped, numbers align right, PASS and FAIL carry a class."""
        head = "".join(f"<th scope=col>{escape(column)}</th>" for column in self.columns)
        body = []
        for row, texts in zip(self.rows, self.formatted()):
            cells = []
            for cell, text in zip(row, texts):
                kind = "pass" if text == PASS else "fail" if text == FAIL else ""
                if not kind and isinstance(cell, Real) and not isinstance(cell, bool):
                    kind = "number"
                cells.append(f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>")
            body.append(f"<tr>{''.join(cells)}</tr>")
        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        rows = "\n".join(body)
        return (
            f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>'
        )

    def to_csv(self) -> str:
        """Comma-separated values with a header line; numbers with all their digits."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(["" if cell is None else cell for cell in row] for row in self.rows)
        return buffer.getvalue()

    def to_markdown(self) -> str:
        """A pipe table; pipes and line breaks inside cells are escaped."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

        return "\n".join([line(self.columns), line(["---"] * len(self.columns)), *map(line, self.formatted())])


@dataclass(frozen=True, kw_only=True)
class Check:
    """One claim of a reproduction, what was measured, and what had to come out."""

    claim: str
    measured: str
    threshold: str
    passed: bool


def checks_table(checks: Sequence[Check], name: str = "checks", caption: str = "") -> Table:
    """The PASS/FAIL table of a reproduction."""
    rows = [[check.claim, check.measured, check.threshold, check.passed] for check in checks]
    return Table(name=name, columns=["claim", "measured", "threshold", "result"], rows=rows, caption=caption)


def print_tables(tables: Sequence[Table], title: str = "") -> None:
    """Prints tables to the terminal; results in green and red, plain text where there is no terminal."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    # Without a terminal rich assumes 80 columns, which would break the lines of a log.
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    if title:
        console.rule(Text(title))
    for table in tables:
        grid = RichTable(title=Text(table.caption) if table.caption else None, title_justify="left")
        for position, column in enumerate(table.columns):
            numeric = all(isinstance(row[position], Real) for row in table.rows) and bool(table.rows)
            truth = all(isinstance(row[position], bool) for row in table.rows)
            grid.add_column(Text(column), justify="right" if numeric and not truth else "left")
        for texts in table.formatted():
            styles = {PASS: "bold green", FAIL: "bold red"}
            grid.add_row(*(Text(text, style=styles.get(text, "")) for text in texts))
        console.print(grid)
