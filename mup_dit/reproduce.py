"""The small reproduction of muP for diffusion transformers: a rate tuned at a narrow network serves a wide one.

    python -m mup_dit.reproduce                        under 3 minutes on two cores, runs/mup_dit-reproduction
    python -m mup_dit.reproduce --output runs/mine --seed 1
    python -m mup_dit.reproduce --full                 three seeds, and muP's init with plain AdamW as a third arm

DiT on the handwritten digits embedded in scikit-learn, in float32 on the CPU. The same command again continues a
reproduction that was interrupted and reuses what is finished. The output folder holds results.json, section.html, a CSV
per table, two PNG per figure (for light and dark pages) and the records of all runs. Exit code 1: a threshold was
missed.
"""

import math
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from common.report.command import exit_code
from common.reproduction.jobs import Job
from common.reproduction.run import Reproduction, run_command
from mup_dit.reproduction.results import arm_name, build_section, first_seed, repeated_seeds
from mup_dit.reproduction.settings import CHECKED, FULL, SMALL, Settings


def plan(settings: Settings, run_seeds: Sequence[int], output: Path, revision: str) -> list[Job]:
    """All jobs, those that take long first, so that two processes end together."""
    values, module = settings.as_dict(), "mup_dit.reproduction"
    jobs: list[tuple[float, Job]] = []

    def train(name: str, cost: float, seed: int, **arguments: object) -> None:
        run_dir = str(output / "runs" / f"{name}-{revision[:8]}")
        job = Job(name, f"{module}.training:train", {"settings": values, "seed": seed, "run_dir": run_dir, **arguments})
        jobs.append((cost, job))

    for seed in run_seeds:
        widest = max(settings.heads)
        train(
            f"convergence-seed{seed}",
            widest**2 * settings.convergence_steps,
            first_seed(seed),
            parametrization="sp",
            heads=widest,
            loglr=math.log2(settings.customary_lr),
            steps=settings.convergence_steps,
            validation_points=settings.validation_points,
        )
        for parametrization, heads, loglr in product(settings.parametrizations, settings.heads, settings.loglrs):
            along = settings.validation_points if heads == widest and parametrization == "mup" else 1
            for one in repeated_seeds(settings, heads, loglr, seed):
                train(
                    arm_name(parametrization, heads * settings.head_size, loglr, one),
                    heads**2 * settings.steps,
                    one,
                    parametrization=parametrization,
                    heads=heads,
                    loglr=loglr,
                    validation_points=along,
                )
    for name in CHECKED:
        seed = run_seeds[0]
        arguments = {"settings": values, "parametrization": name, "seed": seed}
        job = Job(f"coordinates-{name}-seed{seed}", f"{module}.coordinates:check", arguments)
        jobs.append((max(settings.heads) ** 2 * settings.steps + 1, job))
    return [job for _, job in sorted(jobs, key=lambda item: -item[0])]


def summary(name: str, result: dict) -> str:
    """One line on a finished job."""
    if name.startswith("coordinates-"):
        steepest = result["verdict"]["steepest"]
        slope = f"steepest slope {steepest['slope']:+.3f}" if steepest else "nothing measurable"
        return f"{slope}, {'passes' if result['verdict']['passed'] else 'fails'}"
    loss = "diverged" if result["loss"] is None else f"held-out loss {result['loss']:.4f}"
    return f"{loss} after {result['steps']} steps"


REPRODUCTION = Reproduction(
    paper="mup_dit",
    plan=plan,
    summary=summary,
    build_section=build_section,
    presentation=("checks.py", "figures.py", "results.py", "reproduce.py", "transfer_figure.py"),
    small=SMALL,
    full=FULL,
    full_help="three seeds, and muP's init with plain AdamW as a third arm (15 minutes)",
    print_tables=1,
)


def main() -> int:
    """The command line."""
    return run_command(REPRODUCTION, __doc__)


if __name__ == "__main__":
    sys.exit(exit_code(main))
