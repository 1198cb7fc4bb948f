"""What a sweep says: tables, the transfer figure, the learning rate for the target and what the tuning cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common import provenance
from common.errors import DataError
from common.report import Figure, Table
from common.report.page import write_atomically
from mup_dit.arms import FinishedArm, flat, read_sweep
from mup_dit.search import SearchReport, report_search
from mup_dit.sweep import (
    EDGE_FACTOR,
    ArmResult,
    Row,
    RunSize,
    Transfer,
    find_transfer,
    measured_cost,
    rows_of,
    to_csv,
    to_json,
    tuning_cost,
)
from mup_dit.transfer_config import TransferConfig
from mup_dit.transfer_figure import transfer_figure

WITHIN_GROUP = ("heads", "seed", "mup.loglr", "run_dir", "trial")
GRID, SEARCH = "transfer", "search"


@dataclass(frozen=True)
class Report:
    """Of one sweep.

    Attributes:
        lines: the conclusions, as printed.
        unfinished: folders of runs that were stopped.
    """

    lines: tuple[str, ...]
    tables: tuple[Table, ...]
    figure: Figure | None
    unfinished: tuple[Path, ...]
    folder: Path


def make_report(config: TransferConfig) -> Report:
    """Reads the runs below ``config.run_dir``, and writes runs.csv, transfer.json and transfer.png (and -dark) there.

    Raises: DataError if no run is finished.
    """
    folder = Path(config.run_dir)
    arms, unfinished = read_sweep(folder)
    if not arms:
        raise DataError(f"{folder} holds no finished run; run the same command again to continue them.")
    target = config.target_size()
    groups = grouped(arms)
    lines: list[str] = []
    tables: list[Table] = []
    rows: dict[str, Mapping[int, Row]] = {}
    transfers: dict[str, Transfer] = {}
    searches: dict[str, SearchReport] = {}
    for label, results in groups.items():
        if any(result.settings for result in results):
            searches[label] = report_search(results)
            tables += searches[label].tables
            lines += search_lines(config, label, results, searches[label], target)
        else:
            rows[label] = rows_of(results)
            transfers[label] = find_transfer(rows[label])
            lines += transfer_lines(config, label, results, transfers[label], target)
    figure = transfer_figure(rows, transfers) if rows else None
    if rows:
        tables.insert(0, grid_table(rows, transfers))
    if unfinished:
        lines.append(f"unfinished: {', '.join(path.name for path in unfinished)}; the same command continues them")
    found = {
        "target": asdict(target),
        "lines": lines,
        "transfer": {label: {**asdict(transfer), "holds": transfer.holds} for label, transfer in transfers.items()},
        "search": {
            label: {"best": found.best.as_dict(), "medians": dict(found.medians), "importance": dict(found.importance)}
            for label, found in searches.items()
        },
        **provenance.collect(seed=config.seed),
    }
    results = [arm.result for arm in arms]
    write_atomically(folder / "runs.csv", to_csv(results).encode())
    for table in tables:
        write_atomically(folder / f"{table.name}.csv", table.to_csv().encode())
    write_atomically(folder / "transfer.json", (to_json(results, _plain(found)) + "\n").encode())
    if figure is not None:
        write_atomically(folder / "transfer.png", figure.light_png)
        write_atomically(folder / "transfer-dark.png", figure.dark_png)
    return Report(tuple(lines), tuple(tables), figure, tuple(unfinished), folder)


def grouped(arms: Sequence[FinishedArm]) -> dict[str, list[ArmResult]]:
    """Runs that differ in width, rate and seed only, under a label of the options in which groups differ.

    Runs of a random search may differ in what it draws.
    """
    options = [{name: value for name, value in flat(arm.options).items() if name not in _own(arm)} for arm in arms]
    varied = sorted({name for found in options for name in found if any(o.get(name) != found[name] for o in options)})
    groups: dict[str, list[ArmResult]] = {}
    for arm, found in zip(arms, options, strict=True):
        label = ", ".join(f"{name.removeprefix('model.')}={found.get(name)}" for name in varied) or "sweep"
        groups.setdefault(label, []).append(arm.result)
    return groups


def _own(arm: FinishedArm) -> tuple[str, ...]:
    """Options in which a run may differ from others of its group."""
    drawn = {"repa_weight": "objective.repa_weight", "grad_clip": "optim.grad_clip", "warmup": "optim.warmup"}
    return (*WITHIN_GROUP, *(drawn[name] for name in arm.result.settings or {} if name in drawn))


def grid_table(rows: Mapping[str, Mapping[int, Row]], transfers: Mapping[str, Transfer]) -> Table:
    """Held-out losses by width and rate."""
    rates = sorted({rate for by_width in rows.values() for row in by_width.values() for rate in row})
    lines = []
    for label, by_width in rows.items():
        for width, row in by_width.items():
            optimum = transfers[label].optima[width]
            cells = [row.get(rate) for rate in rates]
            lines.append([label, width, *cells, optimum.loglr, round(optimum.vertex, 2), optimum.edge])
    columns = ["runs", "width", *(f"2^{rate:g}" for rate in rates), "best", "fitted", "edge"]
    caption = (
        "Held-out loss by base learning rate; best, fitted optimum and edge (largest rate within "
        f"{EDGE_FACTOR:g} times the least loss) as log2."
    )
    return Table(name=GRID, columns=columns, rows=lines, caption=caption)


def transfer_lines(
    config: TransferConfig, label: str, results: Sequence[ArmResult], transfer: Transfer, target: RunSize
) -> list[str]:
    """The rate for the target, whether to trust it, and the costs."""
    widest = max(transfer.optima)
    optimum = transfer.optima[widest]
    lines = [
        f"{label}: learning rate for width {config.target.heads * config.network.network.head_size}: "
        f"mup.loglr={optimum.vertex:.2f} (2^{optimum.vertex:.2f} = {2**optimum.vertex:.3g}; fitted at width {widest}, "
        f"best of the grid 2^{optimum.loglr:g}, edge 2^{optimum.edge:g})"
    ]
    if len(transfer.optima) > 1:
        regret = "not run" if transfer.regret is None else f"{100 * transfer.regret:+.1f} %"
        lines.append(
            f"{label}: {'transfers' if transfer.holds else 'DOES NOT TRANSFER'}: over the widths the best rate moves "
            f"by {transfer.argmin_spread:g}, the fitted one by {transfer.vertex_spread:.2f}, the edge by "
            f"{transfer.edge_spread:g} octaves; regret of the narrowest's rate at width {widest}: {regret}"
        )
    for width, found in transfer.optima.items():
        if found.at_end:
            lines.append(f"{label}: at width {width} the best rate 2^{found.loglr:g} is an end of the grid; widen it")
    proxy = min(transfer.optima)
    runs = [result for result in results if result.width == proxy]
    size = RunSize(parameters=runs[0].parameters, batch_size=runs[0].batch_size, steps=runs[0].planned_steps)
    cost = tuning_cost(len(runs), size, target)
    lines.append(
        f"{label}: tuning at width {proxy} alone costs {_percent(cost)} of the target run ({len(runs)} runs x "
        f"{size.parameters / 1e6:.3g}/{target.parameters / 1e6:.3g} M parameters x {size.batch_size}/"
        f"{target.batch_size} images x {size.steps}/{target.steps} steps); this whole sweep cost "
        f"{_percent(measured_cost(results, target))}"
    )
    stopped = [result for result in results if result.stopped]
    if stopped:
        saved = sum(result.planned_steps - result.steps for result in stopped)
        planned = sum(result.planned_steps for result in results)
        lines.append(
            f"{label}: {len(stopped)} diverged runs were stopped early, {saved / planned:.0%} of all steps saved"
        )
    return lines


def search_lines(
    config: TransferConfig, label: str, results: Sequence[ArmResult], found: SearchReport, target: RunSize
) -> list[str]:
    """The best trial, and the costs. Source: specification 3.6."""
    options = ", ".join(f"{name} {value:g}" for name, value in (found.best.settings or {}).items())
    medians = ", ".join(f"{name} {value:.4g}" for name, value in found.medians.items())
    size = RunSize(parameters=results[0].parameters, batch_size=results[0].batch_size, steps=results[0].planned_steps)
    return [
        f"{label}: best of {len(results)} trials: {options} (loss {found.best.loss:.4f}); "
        f"medians of the best: {medians}",
        f"{label}: cost R S_p B_p T_p / (S_t B_t T_t) = {_percent(tuning_cost(len(results), size, target))} of the "
        f"target run, {_percent(measured_cost(results, target))} with what early stopping saved",
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _plain(value: object) -> object:
    """Keys as text and no infinities, as JSON wants them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
