"""Trains p-diff, p-diff with an autoencoder, or the autoencoder alone, the baselines that RPG is compared with.

    python -m rpg.train_pdiff data.checkpoints=DIR run_dir=runs/pdiff                      diffusion of whole networks
    python -m rpg.train_pdiff data.checkpoints=DIR run_dir=runs/pdiff_vae model.kind=pdiff_vae   diffusion of latents
    python -m rpg.train_pdiff experiment=compare_pdiff_cnnsmall data.checkpoints=DIR       as in RPG's comparison
    python -m rpg.train_pdiff experiment=compare_pdiff_cnnmedium_vae dry_run=true data.checkpoints=DIR   size and memory

The same command again continues the run. The run folder holds metrics.jsonl, checkpoints/, export/, generated/ with
networks.jsonl and, of an autoencoder before a diffusion, vae/. ``python -m rpg.generate_pdiff`` draws more networks.
Exit code 85 and a file REQUEUE in the run folder: a signal stopped it.
"""

import sys

from common import cli
from rpg.pdiff_config import PdiffTrainConfig
from rpg.pdiff_cost import print_cost
from rpg.pdiff_generation import mean_accuracy
from rpg.pdiff_training import run_training

CONFIG_DIR = "configs/rpg"


def main() -> int:
    """The command line."""
    return cli.run(train, "train_pdiff", PdiffTrainConfig, CONFIG_DIR)


def train(config: PdiffTrainConfig) -> int:
    """Trains as configured, or prints what that would cost.

    Returns: 0, or ``cli.EXIT_REQUEUE`` if a signal stopped the run.
    """
    if config.dry_run:
        print_cost(config)
        return 0
    done = run_training(config)
    if done.fit.stopped_early:
        return cli.EXIT_REQUEUE
    if cli.is_main_process():
        loss = done.fit.metrics.get("train/loss")
        shown = "" if loss is None else f", loss {loss:.4f}"
        print(f"step {done.fit.step}{shown}; model in {done.export}", file=sys.stderr)
        if (accuracy := mean_accuracy(done.records)) is not None:
            mean, error = accuracy
            print(f"{len(done.records)} networks: accuracy {mean:.4f} +- {error:.4f} (standard error)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
