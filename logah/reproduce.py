"""The small reproduction of LoGAH: weights predicted for unseen, larger networks are better starts than random ones.

    python -m logah.reproduce                        under 4 minutes on two cores, runs/logah-reproduction
    python -m logah.reproduce --output runs/mine --seed 1
    python -m logah.reproduce --full                 three hypernetworks of each kind, GHN-3, more data orders

Hypernetworks are trained on small transformers, vision (scikit-learn's handwritten digits) and language (Python's
reference text) side by side, and predict larger ones, which are then trained next to ones that start at random;
float32 on the CPU. The same command again continues a reproduction that was interrupted and reuses what is finished.
The output folder holds results.json, section.html, a CSV per table, two PNG per figure (for light and dark pages) and
the trained hypernetworks. Exit code 1: a threshold was missed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from common.report.command import exit_code
from common.reproduction.jobs import Job
from common.reproduction.run import Reproduction, run_command
from logah.reproduction import names
from logah.reproduction.results import build_section
from logah.reproduction.settings import FULL, LANGUAGE, RANDOM, SMALL, VISION, Settings

MODULE = "logah.reproduction"


def plan(settings: Settings, run_seeds: Sequence[int], output: Path, revision: str) -> list[Job]:
    """All jobs, those that much depends on first, so that two processes end together."""
    values = settings.as_dict()
    training, predicting, starting = [], [], []
    for seed in run_seeds:
        folders = {arm.name: str(output / "runs" / f"{arm.name}-seed{seed}-{revision[:8]}") for arm in settings.arms}
        for arm in settings.arms:
            shared = {"settings": values, "arm": arm.name, "seed": seed, "run_dir": folders[arm.name]}
            training.append(Job(names.trained(arm, seed), f"{MODULE}.training:train", shared))
            if arm.kind == VISION:
                needs = (names.trained(arm, seed),)
                name = names.zero_shot(arm, seed)
                predicting.append(Job(name, f"{MODULE}.finetuning:predicted_accuracies", shared, needs))
        for kind in (LANGUAGE, VISION):
            arms = settings.arms_of(kind)
            for start, needs in [*((arm.name, (names.trained(arm, seed),)) for arm in arms), (RANDOM, ())]:
                if not arms:
                    continue
                for net in settings.nets_of(kind):
                    for order in range(settings.orders_of(start, kind)):
                        arguments = {
                            "settings": values, "kind": kind, "start": start, "net": net.label, "seed": seed,
                            "order": order, "run_dir": folders.get(start),
                        }  # fmt: skip
                        name = names.started(start, kind, net, seed, order)
                        starting.append(Job(name, f"{MODULE}.finetuning:train_from", arguments, needs))
    return [*training, *starting, *predicting]


def summary(name: str, result: dict) -> str:
    """One line on a finished job."""
    if name.startswith("train-"):
        return f"{result['parameters']:,} parameters, loss {result['last']:.3f}"
    if name.startswith("predict-"):
        return ", ".join(f"{row['net']} {100 * row['accuracy']:.0f} %" for row in result["rows"])
    return ", ".join(
        f"lr {curve['lr']:g}: {curve['scores'][0]:.3f} to {curve['scores'][-1]:.3f}" for curve in result["curves"]
    )


REPRODUCTION = Reproduction(
    paper="logah",
    plan=plan,
    summary=summary,
    build_section=build_section,
    presentation=("checks.py", "figures.py", "tables.py", "results.py", "runs.py", "reproduce.py"),
    small=SMALL,
    full=FULL,
    full_help="three hypernetworks of each kind, GHN-3, other learning rates, more data orders (about 30 minutes)",
    print_tables=1,
)


def main() -> int:
    """The command line."""
    return run_command(REPRODUCTION, __doc__)


if __name__ == "__main__":
    sys.exit(exit_code(main))
