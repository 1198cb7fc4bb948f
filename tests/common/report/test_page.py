"""The page is self-contained, escaped, and never replaces a user's file."""

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from common.errors import ConfigError, DataError
from common.report import Check, Page, Section, Table, line_figure, render_page, write_page
from common.report.curves import Series
from common.report.section_folder import load_section, save_section


class Collector(HTMLParser):
    """Tags and everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        names = ("src", "srcset", "data", "poster", "action")
        self.fetched += [value for name, value in attributes if name in names]
        if tag in ("link", "image", "use"):
            self.fetched += [value for name, value in attributes if name in ("href", "xlink:href")]


@pytest.fixture(scope="module")
def section() -> Section:
    return Section(
        title="RADD <small>",
        text="First & foremost.\n\nSecond <i>paragraph</i>.",
        checks=[Check(claim="bound < 2.65", measured="2.50", threshold="2.65", passed=True)],
        tables=[Table(name="bounds", columns=["loss", "bound"], rows=[["t_DSE", 2.501], ["</td><script>", 2.5]])],
        figures=[line_figure("loss", 'Loss "by" type <&>.', [Series("a", [0, 1], [2, 1])])],
        facts={"seed": "0", "<evil>": "<img src=http://example.org/x.png>"},
        listings={"configuration": '{"a": "</pre><script>"}'},
    )


def test_page_loads_nothing_and_runs_nothing(section: Section):
    text = render_page(Page(title="A & B", sections=[section, section]))
    page = Collector()
    page.feed(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert len(page.fetched) == 4  # two figures, each for a light and a dark screen
    assert all(uri.startswith("data:image/png;base64,") for uri in page.fetched)
    assert not re.search(r"@import|url\(", text)
    assert "prefers-color-scheme: dark" in text


def test_all_text_is_escaped(section: Section):
    text = render_page(Page(title="<title>", sections=[section]))
    assert "<script" not in text
    assert "<i>" not in text
    assert "<evil>" not in text
    assert "<small>" not in text
    assert "&lt;img src=http" in text


def test_page_replaces_ours_but_not_a_users_file(tmp_path: Path, section: Section):
    page = Page(title="p", sections=[section])
    path = write_page(tmp_path / "deep" / "report.html", page)
    assert write_page(path, page) == path
    (tmp_path / "mine.html").write_text("<html>my notes</html>")
    with pytest.raises(ConfigError, match=r"mine\.html.*stays as it is"):
        write_page(tmp_path / "mine.html", page)
    assert (tmp_path / "mine.html").read_text() == "<html>my notes</html>"
    write_page(tmp_path / "mine.html", page, force=True)
    with pytest.raises(ConfigError, match="deep"):
        write_page(tmp_path / "deep", page)


def test_failed_write_leaves_the_previous_page_and_no_litter(tmp_path: Path, section: Section, monkeypatch):
    path = write_page(tmp_path / "report.html", Page(title="old", sections=[]))

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_page(path, Page(title="new", sections=[section]))
    assert "<h1>old</h1>" in path.read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_section_survives_the_way_to_disk_and_back(tmp_path: Path, section: Section):
    save_section(tmp_path / "radd", section, values={"seed": 0})
    names = {path.name for path in (tmp_path / "radd").iterdir()}
    assert names == {"results.json", "section.html", "bounds.csv", "checks.csv", "loss.png", "loss-dark.png"}
    again = load_section(tmp_path / "radd")
    assert render_page(Page(title="x", sections=[again])) == render_page(Page(title="x", sections=[section]))
    save_section(tmp_path / "radd", section)  # refreshes its own folder


def test_section_does_not_replace_users_files(tmp_path: Path, section: Section):
    (tmp_path / "bounds.csv").write_text("mine")
    with pytest.raises(ConfigError, match=r"bounds\.csv"):
        save_section(tmp_path, section)
    assert (tmp_path / "bounds.csv").read_text() == "mine"
    assert not (tmp_path / "results.json").exists()


def test_damaged_section_names_its_file(tmp_path: Path, section: Section):
    folder = save_section(tmp_path / "radd", section)
    (folder / "loss-dark.png").unlink()
    with pytest.raises(DataError, match=r"loss-dark\.png"):
        load_section(folder)
    (folder / "results.json").write_text("{")
    with pytest.raises(DataError, match=r"results\.json"):
        load_section(folder)
