"""Tables: escaping, numbers as readers and as machines want them."""

import csv
import io

import pytest

from common.report.tables import Check, Table, checks_table, format_number, print_tables


@pytest.mark.parametrize(
    "value,text",
    [(2.50123, "2.501"), (0.00261, "0.002610"), (1234567, "1,234,567"), (1.5e-7, "1.500e-07"), (None, "–")]
    + [(True, "PASS"), (False, "FAIL"), (float("nan"), "nan"), (0.0, "0"), (40960.0, "40,960"), ("a", "a")],
)
def test_numbers_keep_four_significant_digits(value: object, text: str):
    assert format_number(value) == text


def test_html_escapes_every_text():
    table = Table(name="t", columns=["<b>"], rows=[["<script>alert('x')</script>"]], caption="a & b")
    html = table.to_html()
    assert "<script" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;" in html
    assert "a &amp; b" in html


def test_csv_keeps_every_digit_and_quotes():
    table = Table(name="t", columns=["x", "y,z"], rows=[[1 / 3, 'say "hi", twice'], [None, "line\nbreak"]])
    rows = list(csv.reader(io.StringIO(table.to_csv())))
    assert rows[0] == ["x", "y,z"]
    assert float(rows[1][0]) == 1 / 3
    assert rows[1][1] == 'say "hi", twice'
    assert rows[2] == ["", "line\nbreak"]


def test_markdown_cells_cannot_break_the_table():
    lines = Table(name="t", columns=["a"], rows=[["x | y\nz"]]).to_markdown().splitlines()
    assert lines == ["| a |", "| --- |", "| x \\| y z |"]


def test_row_of_another_length_is_our_bug():
    with pytest.raises(AssertionError, match="table t"):
        Table(name="t", columns=["a", "b"], rows=[[1]])


def test_terminal_shows_results_and_prints_brackets_literally(capsys: pytest.CaptureFixture):
    checks = [Check(claim="[bold]loss[/]", measured="2.5", threshold="< 2.65", passed=True)]
    checks.append(Check(claim="calls", measured="9", threshold="8", passed=False))
    print_tables([checks_table(checks)], title="radd")
    printed = capsys.readouterr().out
    assert "[bold]loss[/]" in printed
    assert "PASS" in printed
    assert "FAIL" in printed
