"""A run folder as report sections: metrics.jsonl, config.json, the newest checkpoint's manifest, samples.

Everything but ``metrics.jsonl`` may be missing; what cannot be read is named on the page instead of failing it.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import imread

from common.errors import DataError
from common.report.curves import Figure, Series, Theme, draw_figure, line_figure
from common.report.page import Page, Section, pretty_json
from common.report.provenance import provenance
from common.report.tables import Table, format_number

METRICS = "metrics.jsonl"
SAMPLE_TEXTS = 6  # texts shown
SAMPLE_CHARACTERS = 4000  # of each text
SAMPLE_IMAGES = 16  # images in the grid
NOT_METRICS = ("step", "time")


@dataclass
class Metrics:
    """Columns of a metrics file: name -> (steps, values), in file order.

    Attributes:
        problems: lines that could not be read, in words.
    """

    columns: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_metrics(path: Path) -> Metrics:
    """Every numeric column of a JSON-lines file; damaged lines are skipped and reported.

    A last line without its end is normal for a run that is being written or was killed.
    """
    metrics = Metrics()
    try:
        content = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); is this a run folder?") from error
    lines = content.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = float(record["step"])
        except (ValueError, KeyError, TypeError):
            last = " (the last one: still being written, or cut off by a kill)" if number == len(lines) else ""
            metrics.problems.append(f"{path.name}, line {number}{last} is not a record and was skipped.")
            continue
        for name, value in record.items():
            if name in NOT_METRICS or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            steps, values = metrics.columns.setdefault(name, ([], []))
            steps.append(step)
            values.append(float(value))
    return metrics


def summary_table(metrics: Metrics) -> Table:
    """First, last, smallest and largest finite value of every column."""
    rows = []
    for name, (steps, values) in metrics.columns.items():
        finite = [value for value in values if math.isfinite(value)]
        low, high = (min(finite), max(finite)) if finite else (math.nan, math.nan)
        rows.append([name, len(values), int(steps[-1]), values[0], values[-1], low, high])
    columns = ["metric", "records", "last step", "first", "last", "smallest", "largest"]
    return Table(name="summary", columns=columns, rows=rows)


def metric_figures(metrics: Metrics) -> list[Figure]:
    """One figure per quantity; ``train/loss`` and ``validation/loss`` share theirs."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in metrics.columns:
        groups[name.rsplit("/", 1)[-1]].append(name)
    figures = []
    for quantity, names in groups.items():
        series = [Series(name, *metrics.columns[name]) for name in names]
        longest = max(len(line.x) for line in series)
        file_name = "".join(c if c.isalnum() else "-" for c in quantity)
        caption = f"{', '.join(names)} by optimizer step."
        if longest > 60:
            caption += " Thick: moving average."
        figures.append(
            line_figure(file_name, caption, series, y_label=quantity, smooth=max(1, min(longest, 2000) // 40))
        )
    return figures


def newest_folder(parent: Path, prefix: str) -> Path | None:
    """The sub-folder ``<prefix><number>`` with the largest number."""
    found = []
    for path in parent.glob(f"{prefix}*") if parent.is_dir() else []:
        digits = path.name[len(prefix) :]
        if path.is_dir() and digits.isdigit():
            found.append((int(digits), path))
    return max(found)[1] if found else None


def read_json(path: Path, problems: list[str]) -> dict:
    """The file's mapping; empty (and named in ``problems``) if it is damaged."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({error}).")
        return {}
    return found if isinstance(found, dict) else {"content": found}


def flat_facts(manifest: Mapping, keys: Sequence[str]) -> dict[str, str]:
    """The manifest's short entries as text; nested ones as ``name value`` pairs."""
    facts = {}
    for key in keys:
        value = manifest.get(key)
        if isinstance(value, Mapping):
            facts[key.replace("_", " ")] = ", ".join(f"{k} {v}" for k, v in value.items())
        elif value is not None:
            facts[key.replace("_", " ")] = str(value)
    return facts


def manifest_facts(manifest: Mapping) -> dict[str, str]:
    """What a checkpoint's manifest says of its origin; file lists and the configuration are left out."""
    keys = [key for key in manifest if key not in ("files", "config", "run_config")]
    return {f"checkpoint {key}": value for key, value in flat_facts(manifest, keys).items()}


def sample_section(run_dir: Path) -> Section | None:
    """Texts and an image grid of the newest folder below ``samples``."""
    parent = run_dir / "samples"
    folder = newest_folder(parent, "iter_") or (parent if parent.is_dir() else None)
    if folder is None:
        return None
    texts = [path for path in sorted(folder.iterdir()) if path.suffix in (".txt", ".jsonl")][:SAMPLE_TEXTS]
    images = [path for path in sorted(folder.iterdir()) if path.suffix in (".png", ".jpg")][:SAMPLE_IMAGES]
    if not texts and not images:
        return None
    listings = {}
    for path in texts:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(SAMPLE_CHARACTERS + 1)
        listings[path.name] = text[:SAMPLE_CHARACTERS] + (" …" if len(text) > SAMPLE_CHARACTERS else "")
    figures = [image_grid("samples", f"Samples in {folder.name}.", images)] if images else []
    return Section(title=f"Samples ({folder.name})", listings=listings, figures=figures)


def image_grid(name: str, caption: str, paths: Sequence[Path], columns: int = 4) -> Figure:
    """Images side by side in rows of ``columns``."""
    images = [imread(path) for path in paths]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        canvas = axes[0].figure
        axes[0].remove()
        for ax, image in zip(np.ravel(canvas.subplots(rows, columns, squeeze=False)), images):
            ax.imshow(image, cmap="gray" if image.ndim == 2 else None)
        for ax in canvas.axes:
            ax.set_axis_off()

    return draw_figure(name, caption, plot, size=(7.2, 7.2 * rows / columns))


def lookup(config: Mapping, key: str) -> object:
    """The first value under ``key`` in the mapping or one of its sub-mappings; None if there is none."""
    if key in config:
        return config[key]
    for value in config.values():
        if isinstance(value, Mapping) and (found := lookup(value, key)) is not None:
            return found
    return None


def run_page(run_dir: Path) -> Page:
    """The report of one run folder.

    Raises: DataError if ``run_dir`` is no folder or holds no ``metrics.jsonl`` with a record.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise DataError(f"run_dir={run_dir} is not a folder; name the folder that a training command wrote.")
    metrics = read_metrics(run_dir / METRICS)
    if not metrics.columns:
        raise DataError(f"{run_dir / METRICS} holds no readable record yet; wait for the run's first logged step.")
    problems = list(metrics.problems)
    config = read_json(run_dir / "config.json", problems)
    checkpoint = newest_folder(run_dir / "checkpoints", "step_")
    manifest = read_json(checkpoint / "manifest.json", problems) if checkpoint else {}
    for line in problems[:20]:
        print(f"report: {line}")

    last = max(int(steps[-1]) for steps, _ in metrics.columns.values())
    highlights = [f"Last logged step {last:,}."]
    for name in ("train/loss", "validation/loss"):
        if name in metrics.columns:
            highlights.append(f"{name} {format_number(metrics.columns[name][1][-1])}.")
    if (run_dir / "REQUEUE").exists():
        highlights.append("The run was interrupted and waits to be continued by the same command.")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        highlights.append(f"Skipped: {' '.join(problems[:5])}{more}")

    origin = {"run folder": run_dir.name}
    if (seed := lookup(config, "seed")) is not None:
        origin["seed"] = str(seed)
    origin |= manifest_facts(manifest)
    origin |= {f"page {name}": value for name, value in provenance().items()}
    sections = [
        Section(
            title="Training",
            text=" ".join(highlights),
            tables=[summary_table(metrics)],
            figures=metric_figures(metrics),
        ),
        sample_section(run_dir),
        Section(title="Origin", facts=origin, listings={"configuration": pretty_json(config)} if config else {}),
    ]
    return Page(title=f"Run {run_dir.resolve().name}", sections=[part for part in sections if part is not None])
