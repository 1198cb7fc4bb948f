"""The small reproduction of RPG: generated networks that work, are no copies, and solve tasks nobody trained for.

    python -m rpg.reproduce                        under 4 minutes on two cores, runs/rpg-reproduction
    python -m rpg.reproduce --output runs/mine --seed 1
    python -m rpg.reproduce --full                 three generators each, and the reference's states and gates

Networks on the handwritten digits embedded in scikit-learn are trained and collected, generators learn from the
collections, and what they generate is tested next to baselines; float32 on the CPU. The same command again continues
a reproduction that was interrupted and reuses what is finished. The output folder holds results.json, section.html, a
CSV per table, two PNG per figure (for light and dark pages), all checkpoints and generators. Exit code 1: a threshold
was missed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from common.report.command import exit_code
from common.reproduction.jobs import Job
from common.reproduction.run import Reproduction, run_command
from rpg.reproduction import names
from rpg.reproduction.results import build_section
from rpg.reproduction.settings import DIGITS, FULL, SEEDS, SMALL, TASKS, Settings
from rpg.reproduction.tasks import SEEN, UNSEEN

MODULE = "rpg.reproduction"
COLLECT = {DIGITS: "collect_digits", SEEDS: "collect_seeds", TASKS: "collect_tasks"}
BASELINES = {DIGITS: "scoring:score_baselines", SEEDS: "scoring:score_baselines", TASKS: "tasks:score_task_baselines"}
DRAW = {DIGITS: "scoring:score_draw", SEEDS: "scoring:score_draw", TASKS: "tasks:score_tasks"}


def plan(settings: Settings, run_seeds: Sequence[int], output: Path, revision: str) -> list[Job]:
    """All jobs, those that much depends on first, so that two processes end together.

    The checkpoints are collected once; further seeds train further generators on them.
    """
    values, first = settings.as_dict(), run_seeds[0]
    folders = {name: str(output / "checkpoints" / f"{name}-{revision[:8]}") for name in COLLECT}
    used = dict.fromkeys(arm.collection for arm in settings.arms)
    collecting = [
        Job(
            names.collected(name, first),
            f"{MODULE}.collection:{COLLECT[name]}",
            {"settings": values, "seed": first, "folder": folders[name]},
        )
        for name in used
    ]
    training, drawing, comparing = [], [], []
    for seed in run_seeds:
        for arm in settings.arms:
            run_dir = str(output / "runs" / f"{arm.name}-seed{seed}-{revision[:8]}")
            shared = {
                "settings": values,
                "arm": arm.name,
                "seed": seed,
                "run_dir": run_dir,
                "folder": folders[arm.collection],
            }
            name = names.trained(arm, seed)
            needs = (names.collected(arm.collection, first),)
            training.append((arm.cost, Job(name, f"{MODULE}.training:train", shared, needs)))
            for draw in arm.draws:
                cost = draw.steps * draw.networks
                job = Job(
                    names.drawn(arm, draw, seed),
                    f"{MODULE}.{DRAW[arm.collection]}",
                    {**shared, "draw": draw.name},
                    (name,),
                )
                drawing.append((cost, job))
    for name in used:
        arguments = {"settings": values, "seed": first, "folder": folders[name]}
        needs = (names.collected(name, first),)
        comparing.append(Job(names.baselines(name, first), f"{MODULE}.{BASELINES[name]}", arguments, needs))

    def longest_first(jobs: list[tuple[float, Job]]) -> list[Job]:
        return [job for _, job in sorted(jobs, key=lambda item: -item[0])]

    return [*collecting, *longest_first(training), *longest_first(drawing), *comparing]


def summary(name: str, result: dict) -> str:
    """One line on a finished job."""
    if name.startswith("collect-"):
        return f"{len(result['accuracy'])} checkpoints, accuracy {fmean(result['accuracy']):.4f}"
    if name.startswith("train-"):
        return f"loss {result['last']:.4f}"
    if name.startswith("baselines-"):
        return f"{len(result)} groups"
    if UNSEEN in result:
        seen, unseen = (fmean(result[key]["accuracy"]) for key in (SEEN, UNSEEN))
        return f"accuracy {seen:.4f} on seen tasks, {unseen:.4f} on unseen ones"
    accuracy = result["accuracy"]
    return f"accuracy {fmean(accuracy):.4f} of {len(accuracy)} networks, worst {min(accuracy):.3f}"


REPRODUCTION = Reproduction(
    paper="rpg",
    plan=plan,
    summary=summary,
    build_section=build_section,
    presentation=("checks.py", "figures.py", "tables.py", "results.py", "reproduce.py"),
    small=SMALL,
    full=FULL,
    full_help="three generators each, the reference's permutation states, gates and normalisation (about 45 minutes)",
    print_tables=3,
)


def main() -> int:
    """The command line."""
    return run_command(REPRODUCTION, __doc__)


if __name__ == "__main__":
    sys.exit(exit_code(main))
