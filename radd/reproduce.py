"""The small reproduction of RADD: four losses, one bound; network calls as predicted; draws that keep rare tokens.

    python -m radd.reproduce                                 under 3 minutes on two cores, runs/radd-reproduction
    python -m radd.reproduce --output runs/mine --seed 1
    python -m radd.reproduce --full                          three seeds, geometric noise, n-gram baselines

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
from radd.reproduction.results import build_section
from radd.reproduction.sampling import ONE_STAGE
from radd.reproduction.settings import FULL, SMALL, Settings


def plan(settings: Settings, run_seeds: Sequence[int], output: Path, revision: str) -> list[Job]:
    """All jobs, those that take long or that others need first."""
    values, cache = settings.as_dict(), str(output / "cache")
    module = "radd.reproduction"
    jobs = [Job("data", f"{module}.training:prepare_data", {"settings": values, "cache_dir": cache})]

    def networks(seed: int) -> list[tuple[str, str, str]]:
        found = [(loss, "loglinear", f"{loss}-seed{seed}") for loss in settings.loss_types]
        if seed == run_seeds[0]:
            found += [(loss, "geometric", f"{loss}-geometric-seed{seed}") for loss in settings.geometric_losses]
        return found

    def run_dir(name: str) -> str:
        return str(output / "runs" / f"{name}-{revision[:8]}")

    for seed in run_seeds:
        for loss, noise, name in networks(seed):
            arguments = {"settings": values, "loss_type": loss, "noise": noise, "seed": seed}
            arguments |= {"run_dir": run_dir(name), "cache_dir": cache}
            jobs.append(Job(f"train-{name}", f"{module}.training:train", arguments, ("data",)))
    for seed in run_seeds:
        for loss, noise, name in networks(seed):
            arguments = {"settings": values, "seed": seed, "run_dir": run_dir(name), "cache_dir": cache}
            jobs.append(Job(f"score-{name}", f"{module}.scoring:score", arguments, (f"train-{name}",)))
            if loss in settings.ordered_losses and noise == "loglinear":
                arguments = {**arguments, "orders": settings.orders}
                jobs.append(Job(f"orders-{name}", f"{module}.scoring:score_orders", arguments, (f"train-{name}",)))
        for mode in (*ONE_STAGE, "two-stage"):
            arguments = {"mode": mode, "seed": seed, "settings": values}
            jobs.append(Job(f"precision-{mode}-seed{seed}", f"{module}.sampling:tail_share", arguments))
        noises = ["loglinear", *(["geometric"] if settings.geometric_losses and seed == run_seeds[0] else [])]
        loss = "lambda_DCE" if "lambda_DCE" in settings.loss_types else settings.loss_types[0]
        for noise in noises:
            arguments = {"settings": values, "seed": seed, "rows": settings.nfe_rows, "noise": noise}
            arguments["run_dir"] = run_dir(f"{loss}-seed{seed}")
            jobs.append(
                Job(
                    f"calls-{noise}-seed{seed}",
                    f"{module}.sampling:measure_calls",
                    arguments,
                    (f"train-{loss}-seed{seed}",),
                )
            )
    jobs.append(Job("baselines", f"{module}.scoring:baselines", {"settings": values, "cache_dir": cache}, ("data",)))
    return jobs


def summary(name: str, result: dict) -> str:
    """One line on a finished job."""
    if name.startswith("train-"):
        return f"training loss {result['last']:.3f}"
    if name.startswith("score-"):
        return "bounds " + ", ".join(f"{cell['mean']:.3f}" for cell in result["cells"].values())
    if name.startswith("orders-"):
        return f"mean over orders {result['random']['mean']:.4f} ± {result['random']['error']:.4f}"
    if name.startswith("calls-"):
        return "calls per row " + ", ".join(f"{point['measured']:.1f}" for point in result["points"])
    if name.startswith("precision-"):
        return f"share of rare tokens {result['share']:.3f} (exact {result['true_share']:.3f})"
    return ", ".join(
        f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in result.items()
    )


REPRODUCTION = Reproduction(
    paper="radd",
    plan=plan,
    summary=summary,
    build_section=build_section,
    presentation=("checks.py", "figures.py", "results.py", "reproduce.py"),
    small=SMALL,
    full=FULL,
    full_help="three seeds, geometric noise, baselines (20 minutes)",
)


def main() -> int:
    """The command line."""
    return run_command(REPRODUCTION, __doc__)


if __name__ == "__main__":
    sys.exit(exit_code(main))
