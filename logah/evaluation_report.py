"""Tables and figures of an evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from common import provenance
from common.evaluation.metric import mean_metric
from common.report import CATEGORIES, Figure, Section, Theme, draw_figure, print_tables
from common.report import provenance as report_facts
from common.report.page import write_atomically
from common.report.section_folder import save_section
from common.report.tables import Table
from logah.evaluation_config import EvaluateConfig
from logah.parameter_statistics import BINS, RANGE

METRICS = ("top1", "top5", "nats", "perplexity", "accuracy", "nats_per_token")
MOST_DRAWN = 6

Record = Mapping[str, Any]


def networks_table(records: Sequence[Record]) -> Table:
    """A row per network."""
    shown = [name for name in METRICS if any(name in record for record in records)]
    columns = ["network", "weights", "seed", "parameters", "not predicted"]
    columns += [column for name in shown for column in (name, f"{name} error")] + ["norm", "seconds"]
    rows = []
    for record in records:
        values = [cell for name in shown for cell in (record.get(name), record.get(f"{name}_se"))]
        left = len(record["uncovered"]) if "uncovered" in record else None
        rows.append([
            record["name"], record["weights"], record["seed"], record.get("parameters"), left, *values,
            record.get("norm"), record["seconds"],
        ])  # fmt: skip
    caption = "Errors are standard errors over the held-out samples; norm: of all parameters as one vector."
    return Table(name="networks", columns=columns, rows=rows, caption=caption)


def problems_table(records: Sequence[Record]) -> Table | None:
    """Networks that could not be evaluated, and why; None if all could."""
    rows = [[r["name"], r["weights"], r["seed"], r["error"]] for r in records if "error" in r]
    columns = ["network", "weights", "seed", "problem"]
    return Table(name="problems", columns=columns, rows=rows, caption="Not evaluated.") if rows else None


def seeds_table(records: Sequence[Record]) -> Table | None:
    """Means over the seeds of each network and kind of weights; None for one seed."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if "error" not in record:
            groups.setdefault((record["name"], record["weights"]), []).append(record)
    if max((len(group) for group in groups.values()), default=0) < 2:
        return None
    shown = [name for name in METRICS if any(name in record for record in records)]
    rows = []
    for (name, source), group in groups.items():
        cells = []
        for metric in shown:
            mean = mean_metric(metric, [record[metric] for record in group])
            cells += [mean.value, mean.standard_error]
        rows.append([name, source, len(group), *cells])
    columns = ["network", "weights", "seeds", *(column for name in shown for column in (name, f"{name} error"))]
    return Table(name="seeds", columns=columns, rows=rows, caption="Means over seeds and their standard errors.")


def tensors_table(records: Sequence[Record]) -> Table:
    """A row per tensor of every network: for files."""
    columns = ["network", "weights", "seed", "tensor", "shape", "norm", "mean", "deviation", "smallest", "largest"]
    rows = [
        [record["name"], record["weights"], record["seed"], row["tensor"], "x".join(map(str, row["shape"])),
         *(row[name] for name in columns[5:])]
        for record in records
        for row in record.get("tensors", [])
    ]  # fmt: skip
    return Table(name="tensors", columns=columns, rows=rows)


def distribution_figure(records: Sequence[Record]) -> Figure | None:
    """Histogram of the entries of matrices, and deviation of each of them along the network."""
    drawn = [record for record in records if record.get("tensors")][:MOST_DRAWN]
    if not drawn:
        return None
    centres_B = (np.arange(BINS) + 0.5) / BINS * 2 * RANGE - RANGE

    def plot(axes: Sequence[Any], theme: Theme) -> None:
        left, right = axes
        for index, record in enumerate(drawn):
            colour, style = theme.colour(index), "-" if index < CATEGORIES else "--"
            label = f"{_short(record['name'])} ({record['weights']}, seed {record['seed']})"
            counts_B = np.array(record["histogram"])
            density_B = counts_B / max(counts_B.sum(), 1) / (2 * RANGE / BINS)
            left.semilogy(centres_B, np.where(density_B > 0, density_B, np.nan), style, color=colour, label=label)
            matrices = [row for row in record["tensors"] if len(row["shape"]) > 1]
            right.semilogy([row["deviation"] or np.nan for row in matrices], style, color=colour, marker=".")
        left.set_xlabel("entry of a matrix")
        left.set_ylabel("density")
        right.set_xlabel("matrix, in the order of the network")
        right.set_ylabel("standard deviation")
        left.legend(fontsize=7)

    caption = f"Parameters of the first {len(drawn)} networks: density of all entries of matrices (outer bins hold what lies beyond), and the deviation of each matrix."  # noqa: E501
    return draw_figure("distributions", caption, plot, size=(9.0, 3.6), panels=2)


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:25]}..."


def suite_figure(records: Sequence[Record]) -> Figure | None:
    """Accuracies of all networks, best first; None for fewer than four."""
    metric = "top1" if any("top1" in record for record in records) else "accuracy"
    scored = sorted((record for record in records if metric in record), key=lambda record: -record[metric])
    if len(scored) < 4:
        return None

    def plot(axes: Sequence[Any], theme: Theme) -> None:
        (ax,) = axes
        place_N = np.arange(len(scored))
        for index, source in enumerate(dict.fromkeys(record["weights"] for record in scored)):
            chosen = [place for place in place_N if scored[place]["weights"] == source]
            values = [scored[place][metric] for place in chosen]
            errors = [scored[place].get(f"{metric}_se") or 0 for place in chosen]
            ax.errorbar(chosen, values, errors, fmt="o", markersize=3, color=theme.colour(index), label=source)
        ax.set_xticks(place_N, [_short(record["name"]) for record in scored], rotation=90, fontsize=6)
        ax.set_ylabel(metric)
        ax.legend()

    caption = f"{metric} of {len(scored)} networks with standard errors over the held-out samples."
    return draw_figure("suite", caption, plot, size=(max(6.0, 0.16 * len(scored)), 4.2))


def write_report(config: EvaluateConfig, records: Sequence[Record]) -> None:
    """Writes ``results.json``, tables, figures and ``section.html`` into ``work_dir``, and prints."""
    folder = Path(config.work_dir)
    made = (networks_table(records), seeds_table(records), problems_table(records))
    tables = [table for table in made if table is not None]
    figures = [distribution_figure(records), suite_figure(records)] if config.figures else []
    tensors = tensors_table(records)
    kept = [
        {name: value for name, value in record.items() if name not in ("tensors", "histogram")} for record in records
    ]
    seed = config.seeds[0]
    section = Section(
        title="Evaluation of predicted networks",
        text=_notes(config, records),
        tables=tables,
        figures=[figure for figure in figures if figure is not None],
        facts=({"data": f"{config.data.name}, {config.split}"} if config.score else {}) | report_facts(seed=seed),
        listings={"files beside this page": "tensors.csv: norm, mean and deviation of every tensor"},
    )
    values = {"networks": kept, "config": asdict(config), **provenance.collect(seed=seed)}
    save_section(folder, section, values=values)
    write_atomically(folder / "tensors.csv", tensors.to_csv().encode())
    print_tables(tables)
    print(f"results: {folder}/section.html, results.json, tensors.csv")


def _notes(config: EvaluateConfig, records: Sequence[Record]) -> str:
    notes = []
    if not config.score:
        notes.append("Nothing was scored (score=false): parameters only.")
    elif config.max_batches is not None:
        notes.append(f"Scored on the first {config.max_batches} batches of the {config.split} data only.")
    if config.score and config.batchnorm == "batch":
        notes.append("Batch norms of predicted networks used each batch's own statistics (batchnorm=batch).")
    failed = [record for record in records if "error" in record]
    if failed:
        notes.append(f"{len(failed)} of {len(records)} networks could not be evaluated; their rows say why.")
    partly = [record for record in records if record.get("uncovered")]
    if partly:
        names = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for record in partly for name in record["uncovered"]))
        notes.append(f"Parameters that no node covers kept random values in {len(partly)} networks: {names}.")
    return "\n\n".join(notes)
