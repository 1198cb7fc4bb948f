"""From the jobs' results to the section: tables, checks, figures."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from common.report import Check, Section, Table
from mup_dit.reproduction.checks import convergence_check, coordinate_checks, transfer_checks
from mup_dit.reproduction.figures import convergence_figure, coordinate_figure
from mup_dit.reproduction.settings import CHECKED, LABELS, REPEATS, Settings
from mup_dit.sweep import (
    EDGE_FACTOR,
    ArmResult,
    Row,
    RunSize,
    Transfer,
    divergence_edge,
    find_transfer,
    stopped_at,
    tuning_cost,
    vertex,
)
from mup_dit.transfer_figure import transfer_figure

STOP_FACTOR, STOP_PATIENCE, STOP_AFTER = 1.5, 3, 0.1  # of the early stopping whose savings are reported

TEXT = """
DiT of three widths is trained on scikit-learn's handwritten digits (8 x 8, 1536 to train on, 261 held out) with six
learning rates, under muP and in the standard parametrisation (SP). All runs see the same images, times and noise.
Losses are mean squared errors of the predicted noise on fixed held-out (image, time, noise) triples: a loss, not FID.

What has to come out: under muP the best rate and the edge of divergence stay where they are when the width grows, so
the narrow network's rate serves the wide one; under SP the edge falls, and rates that are as good as any at the narrow
network ruin the wide one. What is not claimed: at its own best rate SP does as well as muP at these sizes. The gain is
that the rate need not be searched for at the large width.

How it is judged: by weights averaged with decay 0.95, about the last 20 steps, because at a constant rate the last
weights move by more than neighbouring rates differ (1 to 3 % of the loss against 0.4 %). Whether a run near the edge
diverges is luck, so the widest network is trained with three consecutive seeds at 2^-6, by both
parametrisations, and means are judged. The regret is the loss of the wide network at the narrow one's best rate over
its own least loss, minus 1.
"""


def arm_name(parametrization: str, width: int, loglr: float, seed: int) -> str:
    """Name of a run in jobs and folders."""
    return f"{parametrization}-width{width}-lr{loglr:g}-seed{seed}"


def rows_of_seed(settings: Settings, results: Mapping[str, Mapping], parametrization: str, seed: int) -> dict[int, Row]:
    """Width -> loglr -> loss, the mean of runs that were repeated."""

    def loss(heads: int, rate: float) -> float:
        losses = [
            ArmResult.from_dict(results[arm_name(parametrization, heads * settings.head_size, rate, one)]).loss
            for one in repeated_seeds(settings, heads, rate, seed)
        ]
        return fmean(losses) if all(map(math.isfinite, losses)) else math.inf

    return {
        heads * settings.head_size: {rate: loss(heads, rate) for rate in sorted(settings.loglrs)}
        for heads in settings.heads
    }


def repeated_seeds(settings: Settings, heads: int, loglr: float, seed: int) -> list[int]:
    """Seeds that the loss of one cell is the mean of."""
    return [first_seed(seed) + index for index in range(settings.repeats(heads, loglr))]


def powers(rates: Sequence[float]) -> str:
    """``2^-7, 2^-6``."""
    return ", ".join(f"2^{rate:g}" for rate in rates)


def first_seed(seed: int) -> int:
    """Seed of the runs that are not repeated; the blocks of the reproduction's seeds do not overlap."""
    return REPEATS * seed


def sweep_table(settings: Settings, rows: Mapping[str, Mapping[int, Row]]) -> Table:
    """The main table: held-out losses of all runs of one seed."""
    rates = sorted(settings.loglrs, reverse=True)
    lines = []
    for name, by_width in rows.items():
        for width, row in by_width.items():
            best = min(row, key=row.get)
            cells = [f"{row[rate]:.4f}{' *' if rate == best else ''}" for rate in rates]
            lines.append([LABELS[name], width, *cells, f"{vertex(row):.2f}", divergence_edge(row)])
    columns = ["parametrisation", "width", *(f"2^{rate:g}" for rate in rates), "fitted", "edge"]
    caption = (
        "Held-out loss by base learning rate (* least). Fitted: log2 of the minimum of a parabola; edge: largest log2 "
        f"rate with a loss within {EDGE_FACTOR:g} times the least. Width "
        f"{max(settings.widths)} at {powers(settings.repeated_rates)}: means of {REPEATS} seeds."
    )
    return Table(name="sweep", columns=columns, rows=lines, caption=caption)


def regret(rows: Mapping[int, Row]) -> float:
    """Loss of the widest network at the narrowest one's best rate over its least loss, minus 1."""
    narrow, wide = rows[min(rows)], rows[max(rows)]
    return wide[min(narrow, key=narrow.get)] / min(wide.values()) - 1


def convergence_points(settings: Settings, results: Mapping[str, Mapping], narrow: Row, seed: int) -> dict[str, list]:
    """Label -> (step, held-out loss) of the widest network: muP at the transferred rate, SP at two."""
    rate, widest, run_seed = min(narrow, key=narrow.get), max(settings.widths), first_seed(seed)
    sp_row = {r: results[arm_name("sp", widest, r, run_seed)]["loss"] or math.inf for r in settings.loglrs}
    tuned = min(sp_row, key=sp_row.get)
    return {
        f"muP, 2^{rate:g} from width {min(settings.widths)}": results[arm_name("mup", widest, rate, run_seed)][
            "validation"
        ],
        f"SP, customary {settings.customary_lr:g}": results[f"convergence-seed{seed}"]["validation"],
        f"SP, 2^{tuned:g} tuned at width {widest}": results[arm_name("sp", widest, tuned, run_seed)]["validation"],
    }


def convergence_table(curves: Mapping[str, Sequence]) -> Table:
    """The figure's source."""
    lines = [[label, int(step), loss] for label, points in curves.items() for step, loss in points]
    return Table(name="convergence", columns=["run", "step", "held-out loss"], rows=lines, caption="Widest network.")


def slopes_table(checks: Mapping[str, Mapping]) -> Table:
    """Smallest and largest slope of every step."""
    lines = []
    for name, found in checks.items():
        for step in sorted({step for _, step, _ in found["slopes"]}):
            values = {module: slope for module, at, slope in found["slopes"] if at == step}
            steepest = max(values, key=lambda module: abs(values[module]))
            output = values.get("")
            lines.append([LABELS[name], step, min(values.values()), max(values.values()), steepest or "output", output])
    columns = ["parametrisation", "step", "least slope", "largest slope", "steepest module", "output's slope"]
    caption = "Coordinate check: slopes of log2(mean |output|) against log2(width) over all modules."
    return Table(name="slopes", columns=columns, rows=lines, caption=caption)


def cost_table(settings: Settings, results: Mapping[str, Mapping], seed: int) -> Table:
    """What tuning at the narrowest width costs, and what early stopping would have saved."""
    lines = []
    widest = max(settings.widths)
    for name in settings.parametrizations:
        saved = stopped = lost = 0
        planned = 0
        for width in settings.widths:
            runs = {rate: results[arm_name(name, width, rate, first_seed(seed))] for rate in settings.loglrs}
            curves = {
                rate: {step: math.inf if loss is None else loss for step, loss in run["curve"]}
                for rate, run in runs.items()
            }
            ends = stopped_at(
                curves, factor=STOP_FACTOR, patience=STOP_PATIENCE, first_step=int(STOP_AFTER * settings.steps)
            )
            losses = {rate: run["loss"] if run["loss"] is not None else math.inf for rate, run in runs.items()}
            stopped += len(ends)
            lost += sum(losses[rate] <= EDGE_FACTOR * min(losses.values()) for rate in ends)
            saved += sum(settings.steps - step for step in ends.values())
            planned += settings.steps * len(runs)
        narrow = results[arm_name(name, min(settings.widths), settings.loglrs[0], seed)]
        wide = results[arm_name(name, widest, settings.loglrs[0], seed)]
        sizes = [
            RunSize(parameters=run["parameters"], batch_size=settings.batch_size, steps=settings.steps)
            for run in (narrow, wide)
        ]
        cost = tuning_cost(len(settings.loglrs), *sizes)
        lines.append([LABELS[name], f"{100 * cost:.0f} %", stopped, f"{100 * saved / planned:.0f} %", lost])
    columns = [
        "parametrisation",
        f"{len(settings.loglrs)} rates at width {min(settings.widths)}, of one run at {widest}",
        "runs that early stopping would end",
        "steps saved",
        "of them within the edge",
    ]
    caption = (
        f"Early stopping: training loss above {STOP_FACTOR:g} times the width's best at {STOP_PATIENCE} logged points "
        "in a row. It was not used here, so that all losses could be compared."
    )
    return Table(name="cost", columns=columns, rows=lines, caption=caption)


def seeds_table(settings: Settings, rows: Mapping[int, Mapping[str, Mapping[int, Row]]]) -> Table:
    """Mean and deviation of the losses over seeds."""
    rates, lines = sorted(settings.loglrs, reverse=True), []
    for name in settings.parametrizations:
        for width in settings.widths:
            cells = []
            for rate in rates:
                values = [by_name[name][width][rate] for by_name in rows.values()]
                finite = all(map(math.isfinite, values))
                cells.append(f"{fmean(values):.4f} ± {stdev(values):.4f}" if finite else "diverged")
            lines.append([LABELS[name], width, *cells])
    columns = ["parametrisation", "width", *(f"2^{rate:g}" for rate in rates)]
    return Table(name="seeds", columns=columns, rows=lines, caption=f"Mean ± deviation over {len(rows)} seeds.")


def build_section(settings: Settings, seeds: Sequence[int], results: Mapping[str, Mapping], facts: Mapping) -> Section:
    """The section of all seeds; figures and the main tables show the first one.

    Args:
        results: by job name, see ``mup_dit/reproduce.py``.
        facts: provenance and duration.
    """
    names = settings.parametrizations
    rows = {seed: {name: rows_of_seed(settings, results, name, seed) for name in names} for seed in seeds}
    checks: list[Check] = []
    curves: dict[int, dict[str, list]] = {}
    for seed in seeds:
        suffix = f" (seed {seed})" if len(seeds) > 1 else ""
        found = {name: find_transfer(by_width) for name, by_width in rows[seed].items()}
        lost = {name: regret(by_width) for name, by_width in rows[seed].items()}
        checks += transfer_checks(found["mup"], found["sp"], lost, suffix)
        curves[seed] = convergence_points(settings, results, rows[seed]["mup"][min(settings.widths)], seed)
        mup, sp, _ = curves[seed].values()
        checks.append(convergence_check(mup[-1][1], sp[-1][1], (int(mup[-1][0]), int(sp[-1][0])), suffix))
    first = seeds[0]
    coordinates = {name: results[f"coordinates-{name}-seed{first}"] for name in CHECKED}
    checks += coordinate_checks({name: found["verdict"] for name, found in coordinates.items()})
    tables = [sweep_table(settings, rows[first])]
    if len(seeds) > 1:
        tables.append(seeds_table(settings, rows))
    tables += [convergence_table(curves[first]), slopes_table(coordinates), cost_table(settings, results, first)]
    transfers: dict[str, Transfer] = {LABELS[name]: find_transfer(by_width) for name, by_width in rows[first].items()}
    figures = [
        transfer_figure({LABELS[name]: by_width for name, by_width in rows[first].items()}, transfers),
        coordinate_figure(settings, coordinates),
        convergence_figure(curves[first]),
    ]
    return Section(
        title="muP for diffusion transformers: tuning a narrow network for a wide one",
        text=TEXT,
        checks=checks,
        tables=tables,
        figures=figures,
        facts=dict(facts),
    )
