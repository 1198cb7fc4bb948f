"""Reports: curves, tables and one self-contained HTML page, from a run folder or from several papers' reproductions."""

from common.report.curves import CATEGORIES, Figure, Series, Theme, draw_figure, line_figure
from common.report.page import Page, Section, render_page, write_page
from common.report.provenance import provenance
from common.report.tables import Check, Table, checks_table, format_number, print_tables

__all__ = [
    "CATEGORIES",
    "Check",
    "Figure",
    "Page",
    "Section",
    "Series",
    "Table",
    "Theme",
    "checks_table",
    "draw_figure",
    "format_number",
    "line_figure",
    "print_tables",
    "provenance",
    "render_page",
    "write_page",
]
