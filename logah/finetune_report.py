"""What trainings from several starts show together: means over seeds, best rates, who is ahead when."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import provenance
from common.report import CATEGORIES, Figure, Section, Theme, draw_figure, print_tables
from common.report import provenance as report_facts
from common.report.section_folder import save_section
from common.report.tables import Table
from logah.architectures import Architecture
from logah.finetune_config import FinetuneConfig
from logah.finetuning import Finetuned, RunResult

SCORES = {"vision": ("top1", "accuracy (top-1)", True), "lm": ("loss", "loss (nats per token)", False)}
"""Kind -> the value that starts are compared by, what it is called, and whether more is better."""


@dataclass(frozen=True)
class Curve:
    """One start at one learning rate, over its seeds.

    Attributes:
        steps_S, mean_S: evaluations that every seed has reached, and their means.
        error_S: standard error of the mean; 0 for one seed.
        test: mean and standard error on the test data; None where it was not scored.
    """

    label: str
    lr: float
    num_seeds: int
    steps_S: np.ndarray
    mean_S: np.ndarray
    error_S: np.ndarray
    test: tuple[float, float] | None
    diverged: int

    @property
    def final(self) -> float:
        """Last value; NaN if a seed diverged, so that no such rate is chosen."""
        return float("nan") if self.diverged else float(self.mean_S[-1])


def curve_of(runs: Sequence[RunResult], score: str) -> Curve:
    """The curve of the runs of one start and rate."""
    count = min(len(run.points) for run in runs)
    values_RS = np.array([[point[1][score] for point in run.points[:count]] for run in runs], dtype=float)
    tests = [run.test[score] for run in runs if run.test.get(score) is not None]
    return Curve(
        label=runs[0].key.start.label,
        lr=runs[0].key.lr,
        num_seeds=len(runs),
        steps_S=np.array([point[0] for point in runs[0].points[:count]]),
        mean_S=values_RS.mean(0),
        error_S=_error(values_RS),
        test=(float(np.mean(tests)), float(_error(np.array(tests)))) if len(tests) == len(runs) else None,
        diverged=sum(run.diverged for run in runs),
    )


def _error(values_R: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the first axis; 0 for one value."""
    if len(values_R) < 2:
        return np.zeros(values_R.shape[1:])
    return values_R.std(0, ddof=1) / math.sqrt(len(values_R))


def curves_of(found: Finetuned) -> list[Curve]:
    """All curves, start by start in the order of the command."""
    groups: dict[tuple[str, float], list[RunResult]] = {}
    for run in found.runs:
        groups.setdefault((run.key.start.label, run.key.lr), []).append(run)
    labels = list(dict.fromkeys(label for label, _ in groups))
    score = SCORES[found.kind][0]
    return [curve_of(groups[key], score) for label in labels for key in groups if key[0] == label]


def best_curves(curves: Sequence[Curve], more_is_better: bool) -> list[Curve]:
    """Of every start the learning rate with the best last value; the first one if all of them diverged."""
    best = {}
    for curve in curves:
        value = curve.final if more_is_better else -curve.final
        if curve.label not in best or not math.isnan(value) and not value <= best[curve.label][0]:
            best[curve.label] = (value, curve)
    return [curve for _, curve in best.values()]


def first_step_at_least_as_good(curve: Curve, level: float, more_is_better: bool) -> int | None:
    """Steps until the mean is as good as ``level``; None if it never is."""
    good_S = curve.mean_S >= level if more_is_better else curve.mean_S <= level
    return int(curve.steps_S[good_S.argmax()]) if good_S.any() else None


def overtaken(curve: Curve, other: Curve, more_is_better: bool) -> int | None:
    """First common evaluation after a lead of ``curve`` at which ``other`` is ahead; None if there is none."""
    steps = sorted(set(curve.steps_S.tolist()) & set(other.steps_S.tolist()))
    own, others = (dict(zip(each.steps_S.tolist(), each.mean_S.tolist(), strict=True)) for each in (curve, other))
    led = False
    for step in steps:
        ahead = own[step] - others[step] if more_is_better else others[step] - own[step]
        led = led or ahead > 0
        if led and ahead < 0:
            return step
    return None


def comparison_table(found: Finetuned, curves: Sequence[Curve]) -> Table:
    """A row per start at its best rate."""
    score, name, more = SCORES[found.kind]
    best = best_curves(curves, more)
    reference = next((curve for curve in best if curve.label == "random"), None)
    rows = []
    for curve in best:
        level = None if reference is None or curve is reference else reference.final
        reached = None if level is None else first_step_at_least_as_good(curve, level, more)
        crossed = None if level is None else overtaken(curve, reference, more)
        extreme = np.nanmax(curve.mean_S) if more else np.nanmin(curve.mean_S)
        first = curve.mean_S[min(1, len(curve.mean_S) - 1)]
        values = [float(value) for value in (curve.mean_S[0], first, curve.mean_S[-1], curve.error_S[-1], extreme)]
        rows.append([curve.label, curve.lr, curve.num_seeds, *values, *(curve.test or (None, None)), reached, crossed])
    caption = (
        f"{name}, mean over seeds with its standard error; every start at the learning rate with the best last value. "
        "Steps to random: until as good as random weights are at the end; overtaken: first evaluation at which random "
        "weights are ahead after having been behind."
    )
    columns = [
        "start", "best lr", "seeds", "before", "first evaluation", "last", "standard error", "best",
        "test", "test error", "steps to random", "overtaken at",
    ]  # fmt: skip
    if reference is None or len(best) == 1:
        columns, rows = columns[:-2], [row[:-2] for row in rows]
        caption = caption.partition(" Steps to random")[0]
    return Table(name="comparison", columns=columns, rows=rows, caption=caption)


def rates_table(found: Finetuned, curves: Sequence[Curve]) -> Table:
    """A row per start and rate."""
    rows = [
        [
            curve.label, curve.lr, curve.num_seeds, float(curve.mean_S[0]), float(curve.mean_S[-1]),
            float(curve.error_S[-1]), curve.diverged,
        ]
        for curve in curves
    ]  # fmt: skip
    columns = ["start", "lr", "seeds", "before", "last", "standard error", "diverged"]
    return Table(name="rates", columns=columns, rows=rows, caption="All learning rates that were tried.")


def runs_table(found: Finetuned) -> Table:
    """A row per evaluation of every training: for files."""
    names = sorted(
        {name for run in found.runs for _, values in run.points for name in values if not name.endswith("_se")}
    )
    rows = [
        [
            run.key.start.label,
            run.key.seed,
            run.key.lr,
            step,
            step / found.steps_per_epoch,
            *(values.get(n) for n in names),
        ]
        for run in found.runs
        for step, values in run.points
    ]
    return Table(name="runs", columns=["start", "seed", "lr", "step", "epoch", *names], rows=rows)


def curve_figure(found: Finetuned, curves: Sequence[Curve]) -> Figure:
    """Curves at the best rates with bands of one standard error over the seeds."""
    _, name, more = SCORES[found.kind]
    best = best_curves(curves, more)

    def plot(axes: Sequence[Any], theme: Theme) -> None:
        (ax,) = axes
        for index, curve in enumerate(best):
            x_S = curve.steps_S / found.steps_per_epoch if found.kind == "vision" else curve.steps_S
            colour, style = theme.colour(index), "-" if index < CATEGORIES else "--"
            marker = "o" if len(x_S) < 20 else None
            ax.plot(
                x_S,
                curve.mean_S,
                style,
                color=colour,
                marker=marker,
                markersize=3.5,
                label=f"{curve.label}, lr {curve.lr:g}",
            )
            low_S, high_S = curve.mean_S - curve.error_S, curve.mean_S + curve.error_S
            ax.fill_between(x_S, low_S, high_S, color=colour, alpha=0.2, linewidth=0)
        ax.set_xlabel("epoch" if found.kind == "vision" else "optimizer step")
        ax.set_ylabel(name)
        ax.legend()

    seeds = max(curve.num_seeds for curve in best)
    caption = f"{name} of every start at its best learning rate; bands: one standard error over {seeds} seeds."
    return draw_figure("curves", caption, plot, size=(7.2, 3.6))


def write_report(config: FinetuneConfig, architecture: Architecture, found: Finetuned) -> None:
    """Writes ``results.json``, the tables, the figure and ``section.html`` into the run folder, and prints."""
    curves = curves_of(found)
    tables = [comparison_table(found, curves)]
    if len({curve.lr for curve in curves}) > 1:
        tables.append(rates_table(found, curves))
    runs = runs_table(found)
    values = {
        "runs": [_values(run) for run in found.runs],
        "architecture": architecture.to_json(),
        "config": asdict(config),
        "steps_per_epoch": found.steps_per_epoch,
        **provenance.collect(seed=config.seed),
    }
    section = Section(
        title=f"Training {architecture} from {len({curve.label for curve in curves})} starts",
        text=_notes(config, found),
        tables=tables,
        figures=[curve_figure(found, curves)],
        facts={"data": config.data.name} | report_facts(seed=config.seed),
        listings={"files beside this page": "runs.csv, runs/"},
    )
    folder = Path(config.run_dir)
    save_section(folder, section, values=values)
    (folder / "runs.csv").write_text(runs.to_csv())
    print_tables(tables)
    print(f"results: {folder}/section.html, results.json, runs.csv")


def _values(run: RunResult) -> dict[str, Any]:
    points = [{"step": step, **values} for step, values in run.points]
    key = {"start": run.key.start.label, "kind": run.key.start.kind, "seed": run.key.seed, "lr": run.key.lr}
    return {
        **key,
        "points": points,
        "test": run.test,
        "facts": run.facts,
        "diverged": run.diverged,
        "seconds": run.seconds,
    }


def _notes(config: FinetuneConfig, found: Finetuned) -> str:
    """What a reader must know to judge the comparison."""
    notes = [
        f"Curves and learning rates: {config.training.evaluate_on} data. Every start had the same data order, "
        "optimizer and number of steps."
    ]
    if len({run.key.seed for run in found.runs}) < 3:
        notes.append("Fewer than three seeds: the differences carry no measure of their own chance.")
    if len({run.key.lr for run in found.runs}) < 2 and len({run.key.start.label for run in found.runs}) > 1:
        notes.append("One learning rate for all starts: a start may owe its place to it. Set lrs=[...] to tune each.")
    if config.start.reinit_residual:
        notes.append("start.reinit_residual: output projections of predicted networks were drawn anew before training.")
    diverged = [run.key.folder for run in found.runs if run.diverged]
    if diverged:
        notes.append(f"Diverged: {', '.join(diverged)}.")
    for label in dict.fromkeys(run.key.start.label for run in found.runs):
        run = next(run for run in found.runs if run.key.start.label == label)
        left = run.facts.get("uncovered") or run.facts.get("kept_random")
        if left:
            more = f" and {len(left) - 4} more" if len(left) > 4 else ""
            notes.append(f"{label}: not predicted, random: {', '.join(left[:4])}{more}.")
    return "\n\n".join(notes)
