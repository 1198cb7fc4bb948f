"""From the jobs' results to the section: tables, checks, figures."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from common.report import Check, Section, Table
from rpg.reproduction import names
from rpg.reproduction.checks import evaluations_check, novelty_checks, quality_checks, state_checks, task_checks
from rpg.reproduction.figures import loss_figure, sampler_figure, similarity_figure, state_figure, task_figure
from rpg.reproduction.scoring import MEAN, ORIGINALS
from rpg.reproduction.settings import (
    CONDITIONAL,
    DIGITS,
    NO_STATE,
    SEEDS,
    STATES,
    TASKS,
    Arm,
    Draw,
    Settings,
)
from rpg.reproduction.tables import collection_table, distance_table, group_table, seeds_table, task_table
from rpg.reproduction.tasks import TRAINED, UNSEEN

Results = Mapping[str, Mapping]

TEXT = """
Small networks on scikit-learn's handwritten digits (797 to train on, 1000 to test with) are trained, their last states
are collected, and RPG learns to generate such networks: two Mamba-2 blocks make a prototype of every token from its
position (and a condition), a small convolutional denoiser draws the token around it.

Three experiments. One training: generated networks must be as accurate as trained ones without being copies. Several
independent trainings in one folder: it takes a permutation state per training, and averages of networks are useless.
Networks for 1022 tasks "is this digit in the set?": from ten bits, networks for tasks that no training network solved.

How to read novelty: the checkpoints are neighbours on one trajectory, so their mean is accurate too, and part of the
distance from the originals is the generator's own error; a better generator comes closer. What counts is the accuracy
at equal similarity, compared with perturbed originals, and with the mean and interpolation baselines beside it. Errors
are standard errors over networks (over tasks in the third experiment), for one trained generator unless said otherwise.
"""


def draws_of(arm: Arm, results: Results, seed: int) -> list[tuple[Draw, Mapping]]:
    """What was drawn from one generator."""
    return [(draw, results[names.drawn(arm, draw, seed)]) for draw in arm.draws]


def seed_checks(settings: Settings, results: Results, seed: int, suffix: str, first: int) -> list[Check]:
    """All thresholds for the generators of one seed.

    Args:
        first: the seed of the collections, which all generators share.
    """
    checks = []
    arms = {arm.name: arm for arm in settings.arms}
    for arm in settings.arms_of(DIGITS):
        baselines = results[names.baselines(DIGITS, first)]
        drawn = {draw.name: found for draw, found in draws_of(arm, results, seed)}
        few, which = arm.draws[0], f" ({arm.label}){suffix}"
        checks += quality_checks(drawn[few.name], baselines[ORIGINALS], few.label, which)
        consecutive = results[names.collected(DIGITS, first)]["consecutive"]
        checks += novelty_checks(settings, drawn[few.name], baselines, consecutive, which)
        checks += [evaluations_check(few, draw, drawn, suffix) for draw in arm.draws if draw.kind == "ddpm"]
    if STATES.name in arms and NO_STATE.name in arms:
        first_draws = [
            results[names.drawn(arms[name], arms[name].draws[0], seed)] for name in (STATES.name, NO_STATE.name)
        ]
        checks += state_checks(*first_draws, results[names.baselines(SEEDS, first)], suffix)
    if CONDITIONAL.name in arms:
        arm = arms[CONDITIONAL.name]
        checks += task_checks(results[names.drawn(arm, arm.draws[0], seed)], suffix)
    return checks


def unconditional_parts(settings: Settings, results: Results, seed: int, first: int) -> tuple[list[Table], list]:
    """Tables and figures of the first experiment."""
    baselines = results[names.baselines(DIGITS, first)]
    lines = [
        (f"{arm.label}; {draw.label}", draw.steps, found)
        for arm in settings.arms_of(DIGITS)
        for draw, found in draws_of(arm, results, seed)
    ]
    caption = (
        "One training: generated networks by sampler, and what they are compared with. IoU and distance: with the most "
        "similar and the nearest original; of originals, with another one. Apart: mean distance of two networks of the "
        "group. Errors over networks."
    )
    table = group_table("samplers", lines, baselines, caption=caption)
    shown = {label: found for label, _, found in lines}
    figures = [
        similarity_figure(baselines, shown),
        sampler_figure(lines, fmean(baselines[ORIGINALS]["accuracy"])),
    ]
    return [table], figures


def state_parts(settings: Settings, results: Results, seed: int, first: int) -> tuple[list[Table], list]:
    """Tables and figures of the second experiment."""
    baselines = results[names.baselines(SEEDS, first)]
    lines, groups = [], {ORIGINALS: baselines[ORIGINALS]["accuracy"]}
    for arm in settings.arms_of(SEEDS):
        for draw, found in draws_of(arm, results, seed):
            lines.append((f"{arm.label}; {draw.label}", draw.steps, found))
        groups[arm.label] = results[names.drawn(arm, arm.draws[0], seed)]["accuracy"]
    groups[MEAN] = baselines[MEAN]["accuracy"]
    caption = (
        f"{settings.trainings} independent trainings of {settings.checkpoints_each} checkpoints in one folder: "
        "generated networks by what tells the trainings apart."
    )
    return [group_table("states", lines, baselines, caption=caption)], [state_figure(groups)]


def task_parts(settings: Settings, results: Results, seed: int, first: int) -> tuple[list[Table], list]:
    """Tables and figures of the third experiment."""
    baselines = results[names.baselines(TASKS, first)]
    drawn = {}
    for arm in settings.arms_of(TASKS):
        for draw, found in draws_of(arm, results, seed):
            drawn[f"{arm.label}, {arm.steps} steps; {draw.label}"] = found
    main = next(iter(drawn.values()))
    return [task_table(drawn, baselines), distance_table(main)], [task_figure(main, baselines[TRAINED])]


def means_over_seeds(settings: Settings, results: Results, seeds: Sequence[int]) -> Table:
    """How much the results depend on the generator's seed."""
    accuracies: dict[str, list[float]] = {}
    for arm in settings.arms:
        for draw in arm.draws:
            found = [results[names.drawn(arm, draw, seed)] for seed in seeds]
            if arm.collection == TASKS:
                accuracies[f"tasks, {arm.label}: unseen; {draw.label}"] = [
                    fmean(each[UNSEEN]["accuracy"]) for each in found
                ]
            else:
                accuracies[f"{arm.label}; {draw.label}"] = [fmean(each["accuracy"]) for each in found]
    return seeds_table(accuracies)


def generator_table(settings: Settings, results: Results, seed: int) -> Table:
    """What was trained."""
    rows = []
    for arm in settings.arms:
        found = results[names.trained(arm, seed)]
        sizes = [found["parameters"], found["tokens"], settings.dim_per_token]
        rows.append([arm.collection, arm.label, arm.normalisation, arm.steps, *sizes, found["last"]])
    columns = ["collection", "generator", "normalisation", "steps", "parameters", "tokens", "values each", "last loss"]
    caption = "The generators; the last loss is the mean of the last logged steps."
    return Table(name="generators", columns=columns, rows=rows, caption=caption)


PARTS = {DIGITS: unconditional_parts, SEEDS: state_parts, TASKS: task_parts}


def build_section(settings: Settings, seeds: Sequence[int], results: Results, facts: Mapping) -> Section:
    """The section of all seeds; figures and the main tables show the first one.

    Args:
        results: by job name, see ``rpg/reproduction/names.py``.
        facts: provenance and duration.
    """
    first = seeds[0]
    checks: list[Check] = []
    for seed in seeds:
        suffix = f" (seed {seed})" if len(seeds) > 1 else ""
        checks += seed_checks(settings, results, seed, suffix, first)
    collections = dict.fromkeys(arm.collection for arm in settings.arms)
    tables, figures = [], []
    for collection in collections:
        more_tables, more_figures = PARTS[collection](settings, results, first, first)
        tables += more_tables
        figures += more_figures
    if len(seeds) > 1:
        tables.append(means_over_seeds(settings, results, seeds))
    tables.append(collection_table({name: results[names.collected(name, first)] for name in collections}))
    tables.append(generator_table(settings, results, first))
    curves = {f"{arm.collection}: {arm.label}": results[names.trained(arm, first)] for arm in settings.arms}
    return Section(
        title="RPG: networks generated token by token",
        text=TEXT,
        checks=checks,
        tables=tables,
        figures=[*figures, loss_figure(curves)],
        facts=dict(facts),
    )
