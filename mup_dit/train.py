"""Trains DiT, PixArt-alpha or MMDiT, by muP or not; the same command again continues the run.

    python -m mup_dit.train experiment=digits_minutes run_dir=runs/digits              a minute on a laptop
    python -m mup_dit.train model=dit-xl-2 save_base_shapes=width288_d28.bsh           the base-shape file, then stop
    python -m mup_dit.train experiment=dit_xl_2_mup dry_run=true                       size, operations, memory per plan
    NPROC=8 bash scripts/mup_dit/train_torchrun.sh experiment=dit_xl_2_mup data=features data.train=DIR parallel=ddp

The run folder holds config.json, metrics.jsonl, checkpoints/, samples/ and, once trained, export/ (safetensors and
config.json with the table of multipliers). Exit code 85 and a file REQUEUE in it: a signal stopped it.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common import cli
from common.checkpoint import load_weights
from common.dry_run import estimate, print_estimate
from mup_dit.base_shapes import write_base_shapes
from mup_dit.building import build_skeleton, compute_base_shapes
from mup_dit.config import TrainConfig
from mup_dit.data import Data, describe_sources
from mup_dit.saving import save_model
from mup_dit.snapshots import Snapshots
from mup_dit.training import build_task, run_training

CONFIG_DIR = "configs/mup_dit"
DRY_RUN_PROCESSES = 8  # for which sharded plans are shown unless ngpus says how many


def main() -> int:
    """The command line."""
    return cli.run(train, "train", TrainConfig, CONFIG_DIR)


def train(config: TrainConfig) -> int:
    """Trains as configured, or prints what that would cost, or writes the base shapes.

    Returns: 0, or ``cli.EXIT_REQUEUE`` if a signal stopped the run.
    """
    if config.save_base_shapes is not None:
        shapes = compute_base_shapes(config.network)
        if cli.is_main_process():
            path = write_base_shapes(config.save_base_shapes, shapes)
            print(f"{path}: {len(shapes)} parameters, base width {config.network.base_width}", file=sys.stderr)
        return 0
    if config.dry_run:
        print_cost(config)
        return 0
    trainer = config.trainer_config(cli.world_size())  # its checks come before any data is read
    build_skeleton(config.network)  # so do those of the parametrisation
    done = run_training(config, trainer, lambda data: snapshots(config, data))
    if done.stopped_early:
        return cli.EXIT_REQUEUE
    if cli.is_main_process():
        folder = export(done.run_dir, config)
        loss = done.metrics.get("validation/loss", done.metrics.get("train/loss"))
        print(f"step {done.step}{f', loss {loss:.4f}' if loss is not None else ''}; model in {folder}", file=sys.stderr)
    return 0


def snapshots(config: TrainConfig, data: Data) -> list[Snapshots]:
    """The hook that saves the model and a grid of samples."""
    shown, examples = data.train if data.valid is None else data.valid, {}
    if config.sampling.images:
        examples = shown.fetch(np.arange(min(config.sampling.images, len(shown))))
    return [Snapshots(config, examples, data.decode)]


def export(run_dir: Path, config: TrainConfig) -> Path:
    """Writes the trained model (the moving average, if there is one) as safetensors and config.json."""
    weights, _ = load_weights(run_dir)
    model = build_skeleton(config.network).to_empty(device="cpu")
    model.reset_tables(None)
    model.load_state_dict(weights, strict=True)
    metadata = {
        "run": run_dir.name,
        "seed": config.seed,
        "objective": asdict(config.objective),
        **describe_sources(config.data, config.network),
    }
    return save_model(run_dir / "export", model, config.network, metadata=metadata, overwrite=True)


def print_cost(config: TrainConfig) -> None:
    """Parameters, operations per step and memory per process for every plan; no weight is read or allocated."""
    expected = config.ngpus or (cli.world_size() if cli.world_size() > 1 else None)
    trainer = config.trainer_config(expected or 1)
    micro_sizes = {1: config.training.batch_size // config.training.accum}
    for processes in [expected] if expected else range(DRY_RUN_PROCESSES, 1, -1):
        if processes > 1 and config.training.batch_size % (config.training.accum * processes) == 0:
            micro_sizes[processes] = config.training.batch_size // (config.training.accum * processes)
            break
    task = build_task(config, None)

    def forward(model: nn.Module, rows: int) -> Tensor:
        network = config.network.network
        batch = {"label": torch.zeros(rows, dtype=torch.int64)}
        if config.network.family != "dit":
            batch["caption"] = torch.zeros(rows, 1, network.model_max_length, network.caption_channels)
            batch["pooled"] = torch.zeros(rows, getattr(network, "pooled_channels", 1))
            batch["img_hw"], batch["aspect_ratio"] = torch.ones(rows, 2), torch.ones(rows, 1)
        x = torch.zeros(rows, network.in_channels, network.input_size, network.input_size)
        return model(x, torch.zeros(rows), **task.condition(batch, None))

    if cli.is_main_process():
        print_estimate(estimate(task, trainer, micro_sizes=micro_sizes, forward=forward))


if __name__ == "__main__":
    sys.exit(main())
