"""One self-contained HTML page: inline style, figures as data URIs, no script and no request to anywhere.

A page is a list of sections; a section is text, checks, tables and figures. All text is escaped. A content security
policy in the page forbids the browser to load anything, so that a figure that is not inline would show at once.
"""

import base64
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from common.errors import ConfigError
from common.report.curves import Figure
from common.report.tables import Check, Table, checks_table

GENERATOR = "quintet common.report"

STYLE = """
:root { color-scheme: light dark; --back: #f4f5f7; --card: #ffffff; --text: #1f2328; --soft: #59636e; --line: #d9dde3;
  --good: #0a7a3d; --bad: #c1271c; --link: #1f5fbf; }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --card: #161b22; --text: #e6edf3; --soft: #9aa4b0;
  --line: #39424e; --good: #4cc87e; --bad: #ff7b72; --link: #6ea8fe; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 24px; margin: 8px 0; } h2 { font-size: 18px; margin: 0 0 8px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px 20px;
  margin: 16px 0; }
p { margin: 8px 0; max-width: 80ch; } a { color: var(--link); } nav a { margin-right: 16px; }
.soft, caption, figcaption { color: var(--soft); font-size: 13.5px; }
caption { text-align: left; padding: 4px 0; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: 4px 12px 4px 0; text-align: left; vertical-align: top; }
td.number { text-align: right; } td.pass { color: var(--good); font-weight: 600; }
td.fail { color: var(--bad); font-weight: 700; }
figure { margin: 16px 0; }
figure img { max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; }
pre { background: var(--back); border: 1px solid var(--line); border-radius: 6px; padding: 10px; overflow-x: auto;
  font-size: 12.5px; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--soft); }
@media print { body { background: none; } section { break-inside: avoid; } }
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page.

    Attributes:
        text: paragraphs separated by blank lines; plain text.
        checks: claims with their result; shown first.
        listings: title -> verbatim text (samples, configuration), folded.
        facts: name -> value, e.g. seed, revision, hardware.
    """

    title: str
    text: str = ""
    checks: Sequence[Check] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    listings: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check of the section holds (true without checks)."""
        return all(check.passed for check in self.checks)


@dataclass(frozen=True, kw_only=True)
class Page:
    """A titled list of sections."""

    title: str
    sections: Sequence[Section]
    text: str = ""


def data_uri(content: bytes, media_type: str = "image/png") -> str:
    """The bytes as a URI that needs no file."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def figure_html(figure: Figure) -> str:
    """An image that follows the reader's light or dark setting, with its caption."""
    caption = escape(figure.caption)
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{data_uri(figure.dark_png)}">'
    image = f'<img alt="{escape(figure.caption, quote=True)}" src="{data_uri(figure.light_png)}">'
    return f"<figure><picture>{dark}{image}</picture><figcaption>{caption}</figcaption></figure>"


def paragraphs(text: str) -> str:
    """Escaped paragraphs; blank lines separate them."""
    return "".join(f"<p>{escape(part.strip())}</p>" for part in re.split(r"\n\s*\n", text) if part.strip())


def facts_html(facts: Mapping[str, str]) -> str:
    """Two-column table of names and values."""
    rows = "".join(f"<tr><th scope=row>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in facts.items())
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>' if rows else ""


def render_section(section: Section, anchor: str = "") -> str:
    """One section as an HTML fragment."""
    parts = [f'<section id="{escape(anchor, quote=True)}"><h2>{escape(section.title)}</h2>', paragraphs(section.text)]
    if section.checks:
        parts.append(checks_table(section.checks).to_html())
    parts += [table.to_html() for table in section.tables]
    parts += [figure_html(figure) for figure in section.figures]
    if section.facts:
        parts.append(facts_html(section.facts))
    for title, text in section.listings.items():
        parts.append(f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>")
    parts.append("</section>")
    return "\n".join(part for part in parts if part)


def render_page(page: Page) -> str:
    """The whole page as text."""
    anchors = [f"section-{number}" for number in range(1, len(page.sections) + 1)]
    links = ""
    if len(page.sections) > 1:
        items = "".join(f'<a href="#{anchor}">{escape(part.title)}</a>' for anchor, part in zip(anchors, page.sections))
        links = f"<nav>{items}</nav>"
    body = "\n".join(render_section(part, anchor) for anchor, part in zip(anchors, page.sections))
    title = escape(page.title)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="generator" content="{GENERATOR}">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{title}</h1>{paragraphs(page.text)}{links}\n{body}\n</main></body></html>\n"
    )


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside the target and renames, so that a reader or a crash never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner may read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def is_ours(path: Path) -> bool:
    """Whether an HTML file was written by this package, or is absent."""
    if not path.exists():
        return True
    if path.is_dir():
        return False
    with path.open("rb") as file:
        return f'content="{GENERATOR}"'.encode() in file.read(2000)


def write_page(path: Path, page: Page, *, force: bool = False) -> Path:
    """Writes the page; a page of ours is refreshed, any other file is left alone.

    Raises: ConfigError if ``path`` holds something that this package did not write and ``force`` is false.
    """
    path = Path(path)
    if not force and not is_ours(path):
        raise ConfigError(
            f"output={path} exists and is not a report of ours; it stays as it is. Name another file or add --force."
        )
    write_atomically(path, render_page(page).encode())
    return path


def pretty_json(value: object) -> str:
    """Indented JSON of anything JSON-able; other objects as their text."""
    return json.dumps(value, indent=2, sort_keys=False, ensure_ascii=False, default=str)
