"""The small reproduction of DiffuLLaMA: adapting an autoregressive model beats diffusion training from scratch.

    python -m diffullama.reproduce                        under 3 minutes on two cores, runs/diffullama-reproduction
    python -m diffullama.reproduce --output runs/mine --seed 1
    python -m diffullama.reproduce --full                 three seeds, adaptation without shift, without annealing

Everything is computed from text embedded in Python, in float32 on the CPU. The same command again continues a
reproduction that was interrupted and reuses what is finished. The output folder holds results.json, section.html, a CSV
per table, two PNG per figure (for light and dark pages) and the run folders of the trained networks. Exit code 1: a
threshold was missed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from common.report.command import exit_code
from common.reproduction.jobs import Job
from common.reproduction.run import Reproduction, run_command
from diffullama.reproduction.results import build_section
from diffullama.reproduction.settings import FULL, SMALL, Settings


def plan(settings: Settings, run_seeds: Sequence[int], output: Path, revision: str) -> list[Job]:
    """All jobs, those that take long or that others need first."""
    values, cache = settings.as_dict(), str(output / "cache")
    module = "diffullama.reproduction"
    jobs = [Job("data", f"{module}.training:prepare_data", {"settings": values, "cache_dir": cache})]

    def run_dir(name: str) -> str:
        return str(output / "runs" / f"{name}-{revision[:8]}")

    # With two processes: the parent and then its child on one, scratch+ and scratch= on the other.
    first, *others = settings.arms()
    arms = [first, *sorted(others, key=lambda arm: -arm.steps - settings.ar_steps * arm.parent)]
    for seed in run_seeds:
        shared = {"settings": values, "seed": seed, "cache_dir": cache}
        parent = f"ar-seed{seed}"
        for arm in arms:
            name = f"{arm.name}-seed{seed}"
            arguments = {**shared, "arm": arm.name, "run_dir": run_dir(name)}
            needs = ("data",)
            if arm.parent:
                arguments["parent_dir"], needs = run_dir(parent), (f"train-{parent}",)
            jobs.append(Job(f"train-{name}", f"{module}.training:train", arguments, needs))
        jobs.append(
            Job(
                f"start-seed{seed}",
                f"{module}.scoring:untrained",
                {**shared, "parent_dir": run_dir(parent)},
                (f"train-{parent}",),
            )
        )
        for arm in arms:
            name = f"{arm.name}-seed{seed}"
            arguments = {**shared, "arm": arm.name, "run_dir": run_dir(name)}
            jobs.append(Job(f"score-{name}", f"{module}.scoring:score", arguments, (f"train-{name}",)))
    return jobs


def summary(name: str, result: dict) -> str:
    """One line on a finished job."""
    if name.startswith("train-"):
        return f"training loss {result['last']:.3f}, held out {result['validation_bounds'][-1]:.3f}"
    if name.startswith("start-"):
        return f"bound of the AR parent under full attention {result['bound']['mean']:.3f}"
    if name.startswith("score-"):
        bound, cloze = result["bound"], result["cloze"]["nll"]
        return f"bound {bound['mean']:.3f}, single hidden tokens {cloze['mean']:.3f} ± {cloze['error']:.3f}"
    return ", ".join(f"{key} {value}" for key, value in result.items())


REPRODUCTION = Reproduction(
    paper="diffullama",
    plan=plan,
    summary=summary,
    build_section=build_section,
    presentation=("checks.py", "figures.py", "results.py", "reproduce.py"),
    small=SMALL,
    full=FULL,
    full_help="three seeds, adaptation without shift and without annealing (15 minutes)",
    print_tables=2,
)


def main() -> int:
    """The command line."""
    return run_command(REPRODUCTION, __doc__)


if __name__ == "__main__":
    sys.exit(exit_code(main))
