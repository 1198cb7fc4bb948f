"""What ``python -m rpg.evaluate`` does: compares generated networks with the originals and with baselines made of them.

``work_dir`` then holds ``results.json``, ``section.html``, a CSV per table (``networks.csv`` has a row per network,
``iou.csv`` the matrix of all pairs), the figures as PNG and the remembered predictions.

Dimensions: K networks of a group, V compared values.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from common.conversion import from_config
from common.errors import ConfigError
from common.provenance import collect
from common.report import Figure, Section, print_tables, provenance
from common.report.page import write_atomically
from common.report.section_folder import RESULTS, holds_section, save_section
from common.report.tables import Table
from rpg.analysis import Analysis, analyse
from rpg.candidates import Groups, build_groups, from_folder, split_by_task, tasks_of
from rpg.drawing import Drawing, open_generator
from rpg.evaluation_config import EvaluateConfig
from rpg.evaluation_tables import (
    classes_table,
    ensembles_table,
    findings_table,
    groups_table,
    nearest_table,
    networks_table,
    spacing_facts,
    task_rows_table,
    tasks_table,
    tensors_table,
)
from rpg.examination import Examined, examine, require_some_tested
from rpg.figures import distance_figure, histogram_figure, novelty_figure, plane_figure, task_figure
from rpg.novelty import ORIGINAL
from rpg.predictions import PredictionCache, hash_tester
from rpg.tasks import parse_name
from rpg.testing import TesterSection, build_tester
from rpg.zoo.testers import collection_tester

logger = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluates as configured, writes and prints. Returns the values of ``results.json``.

    Raises: ConfigError, DataError or CheckpointError for anything the user can repair.
    """
    folder = Path(config.work_dir)
    check_free(folder, overwrite=config.overwrite)
    began = time.perf_counter()
    drawing = open_generator(config) if config.generator else None
    section = choose_tester(config, drawing)
    tester = build_tester(section)
    cache_dir = Path(config.cache_dir or folder / "predictions") if config.cache else None
    cache = PredictionCache(cache_dir, hash_tester(section))
    groups = collect_groups(config, drawing)
    examined, sample = examine(
        groups,
        tester,
        cache,
        memory_bytes=int(config.memory_gb * 2**30),
        seed=config.seed,
        progress=config.progress,
    )
    require_some_tested(examined, tester)
    found = analyse(examined, sample, config, tester, cache)
    cost = drawing.measure() if drawing and config.efficiency.networks else None
    values = _values(found, cost) | {
        "seconds": round(time.perf_counter() - began, 3),
        "remembered_predictions": cache.hits,
        "new_predictions": cache.misses,
        "tester": asdict(section),
        "generator": drawing and {"sha256": drawing.loaded.digest, **drawing.loaded.metadata},
        "config": asdict(config),
        **collect(seed=config.seed),
    }
    _write(folder, config, found, cost, values)
    return values


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Makes the folder of results. Raises: ConfigError if results stand there that may not be replaced."""
    if (folder / RESULTS).exists() and not (overwrite and holds_section(folder)):
        hint = "use overwrite=true, or " if holds_section(folder) else ""
        raise ConfigError(f"work_dir={folder} holds {RESULTS} already; {hint}choose another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"work_dir={folder} cannot be made ({error.strerror}); choose a folder you can write to."
        ) from None


def choose_tester(config: EvaluateConfig, drawing: Drawing | None) -> TesterSection:
    """The tester of the options; else that of the generator's run; else that of the collection of originals."""
    if config.tester.kind != "none":
        return config.tester
    if drawing is not None and drawing.loaded.facts.tester is not None:
        return from_config(TesterSection, drawing.loaded.facts.tester, "tester")
    return (config.originals and collection_tester(config.originals)) or config.tester


def collect_groups(config: EvaluateConfig, drawing: Drawing | None) -> Groups:
    """Originals, generated networks (drawn first where there is a generator), held-out networks and baselines."""
    originals = generated = held_out = []
    if config.originals:
        originals = from_folder(config.originals, "originals", config.pattern, config.max_originals)
    if config.held_out:
        held_out = from_folder(config.held_out, "held_out")
    if drawing is not None:
        generated = from_folder(drawing.draw(), "generated")
    elif config.generated:
        generated = from_folder(config.generated, "generated")
    baselines = config.baselines
    groups = build_groups(
        originals,
        generated,
        held_out,
        seed=config.seed,
        noise_levels=baselines.noise,
        noise_repeats=baselines.noise_repeats,
        mean=baselines.mean,
        interpolations=baselines.interpolations,
        regression=baselines.regression,
        penalty=baselines.penalty,
    )
    return split_by_task(groups) if tasks_of([*originals, *generated]) else groups


# ---------------------------------------------------------------- what is written


def _values(found: Analysis, cost: Mapping[str, Any] | None) -> dict[str, Any]:
    """Numbers for ``results.json``."""
    groups = {}
    for name, group in found.groups.items():
        summary = found.summaries.get(name)
        distances = [each.distance for each in found.nearest[name] if each is not None]
        groups[name] = {
            "networks": len(group.networks),
            "failed_tests": sum(error is not None for error in group.error),
            "accuracy": summary and _metric(summary.accuracy),
            "accuracy_min": summary and summary.lowest,
            "accuracy_max": summary and summary.highest,
            "iou_within": summary and _metric(summary.within),
            "iou_with_originals": summary and _metric(summary.with_originals),
            "iou_nearest_original": summary and _metric(summary.similarity),
            "distance_nearest_original": sum(distances) / len(distances) if distances else None,
            "distance_smallest": min(distances, default=None),
            "notes": list(summary.notes) if summary else ["not tested"],
        }
    return {
        "groups": groups,
        "spacing_of_originals": None if found.spacing is None else asdict(found.spacing),
        "compared_values": {"sampled": found.sample.num_sampled, "all": found.sample.num_values},
        "findings": [asdict(each) for each in found.findings],
        "ensembles": [asdict(each) for each in found.ensembles],
        "tasks": [asdict(each) for each in found.tasks],
        "efficiency": cost,
    }


def _metric(metric: Any) -> dict[str, float | None] | None:
    return None if metric is None else {"value": metric.value, "standard_error": metric.standard_error}


def _write(
    folder: Path, config: EvaluateConfig, found: Analysis, cost: Mapping[str, Any] | None, values: dict[str, Any]
) -> None:
    shown = [
        groups_table(found), findings_table(found), tasks_table(found), ensembles_table(found), cost_table(cost),
        nearest_table(found), classes_table(found), tensors_table(found),
    ]  # fmt: skip
    tables = [table for table in shown if table is not None]
    # tables with a row per network or pair would make the page long: files only
    apart = [table for table in (networks_table(found), task_rows_table(found), iou_table(found)) if table is not None]
    for table in apart:
        write_atomically(folder / f"{table.name}.csv", table.to_csv().encode())
    section = Section(
        title="Evaluation of generated networks",
        text=_notes(found),
        tables=tables,
        figures=build_figures(found) if config.figures else [],
        facts=spacing_facts(found) | {"seed": str(config.seed)} | provenance(),
        listings={"files beside this page": ", ".join(f"{table.name}.csv" for table in apart)},
    )
    save_section(folder, section, values=values)
    print_tables([table for table in tables if table.name not in ("classes", "tensors")])
    print(f"results: {folder}/section.html, {RESULTS}, networks.csv")


def _notes(found: Analysis) -> str:
    """What is missing, and why."""
    notes = []
    if not found.summaries:
        notes.append("No tester was given (tester.kind): weights were compared, accuracy is unknown.")
    elif found.iou_KK is None and not found.has_tasks:
        notes.append("A test program tells accuracies only: errors of networks could not be compared.")
    for name, summary in found.summaries.items():
        notes += [f"{name}: {note}." for note in summary.notes]
    if ORIGINAL not in found.groups:
        notes.append("No originals were given: no baselines and no distances.")
    return "\n\n".join(notes)


def iou_table(found: Analysis) -> Table | None:
    """The matrix of all pairs."""
    if found.iou_KK is None:
        return None
    names = list(found.iou_names)
    rows = [[name, *row] for name, row in zip(names, found.iou_KK.tolist(), strict=True)]
    return Table(name="iou", columns=["network", *names], rows=rows)


def cost_table(cost: Mapping[str, Any] | None) -> Table | None:
    """What generating one network takes."""
    if cost is None:
        return None
    rows = [[name.replace("_", " "), value] for name, value in cost.items()]
    return Table(
        name="efficiency", columns=["quantity", "value"], rows=rows, caption="Generating networks, one by one."
    )


def build_figures(found: Analysis) -> list[Figure]:
    """The figures for which there is something to draw."""
    figures = []
    by_similarity: dict[str, list[tuple[float, float]]] = {}
    by_distance: dict[str, list[tuple[float, float]]] = {}
    for name, group in found.groups.items():
        for place in group.tested():
            nearest, accuracy = found.nearest[name][place], group.accuracy[place]
            if found.similarity[name][place] is not None:
                by_similarity.setdefault(name, []).append((found.similarity[name][place], accuracy))
            if nearest is not None:
                by_distance.setdefault(name, []).append((nearest.distance, accuracy))
    if by_similarity:
        figures.append(novelty_figure(by_similarity))
    if by_distance:
        figures.append(distance_figure(by_distance, found.spacing and found.spacing.copy_limit))
    if found.tasks and any(row.group in found.generated_groups() for row in found.tasks):
        figures.append(task_figure(found.tasks))
    generated = [found.groups[name] for name in found.generated_groups()]
    if generated and ORIGINAL in found.groups:
        values_KV = torch.cat([group.values_KV[torch.tensor(group.finite)] for group in generated])
        originals = found.groups[ORIGINAL]
        if len(values_KV) and any(originals.finite):
            figures.append(
                histogram_figure(found.sample, originals.values_KV[torch.tensor(originals.finite)], values_KV)
            )
    if found.plane:
        figures.append(plane_figure(found.plane, found.plane_shares, training_runs(found.groups.get(ORIGINAL))))
    return figures


def training_runs(originals: Examined | None) -> list[list[int]]:
    """Places of the finite originals that lie in one folder and have the same seed or task in their names."""
    runs: dict[tuple, list[int]] = {}
    if originals is not None:
        finite = [network for network, is_finite in zip(originals.networks, originals.finite, strict=True) if is_finite]
        for place, network in enumerate(finite):
            parsed = parse_name(network.name)
            key = (Path(network.name).parent, parsed and parsed.condition, parsed and parsed.value)
            runs.setdefault(key, []).append(place)
    return [places for places in runs.values() if len(places) > 1]
