"""What a comparison of starts would take: trainings, steps, size of the network, memory per process by plan."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from common import cli
from common.dry_run import estimate, print_estimate
from common.errors import DataError
from logah.architectures import Architecture, resolve_target
from logah.data import build_data
from logah.finetune_config import FinetuneConfig
from logah.finetune_task import FinetuneTask
from logah.matching import match_data

DRY_RUN_PROCESSES = 8  # for which sharded plans are shown unless ngpus says how many


def print_cost(config: FinetuneConfig) -> None:
    """Prints; nothing is trained, and no weight of the target is allocated.

    Data that are not here leave the steps of an epoch open.
    """
    architecture, steps_per_epoch = resolve_target(config.target), None
    try:
        data = build_data(config.data)
    except DataError as error:
        print(f"data: {error}", file=sys.stderr)
    else:
        architecture = match_data(architecture, data, enabled=config.match_data)
        steps_per_epoch = data.steps_per_epoch
    task = FinetuneTask(
        lambda: without_numbers(architecture),
        architecture.kind,
        loss=config.training.loss,
        block_size=config.data.block_size if architecture.kind == "lm" else None,
        image_size=architecture.image_size,
    )
    expected = config.ngpus or (cli.world_size() if cli.world_size() > 1 else None)
    engine = replace(config, ngpus=None).engine(
        config.run_dir, seed=config.seed, optim=config.optim, steps_per_epoch=steps_per_epoch or 1, world_size=1
    )
    micro_sizes = {1: engine.batch.micro_size}
    for processes in [expected] if expected else range(DRY_RUN_PROCESSES, 1, -1):
        if processes > 1 and engine.batch.micro_size % processes == 0:
            micro_sizes[processes] = engine.batch.micro_size // processes
            break
    if not cli.is_main_process():
        return
    runs = len(config.starts) * len(config.seeds or [0]) * len(config.lrs or [0])
    length = f"{engine.total_steps} steps" if steps_per_epoch else f"{config.training.epochs} epochs of unknown length"
    print(f"{architecture}: {runs} trainings of {length}", file=sys.stderr)
    print_estimate(estimate(task, engine, micro_sizes=micro_sizes, forward=lambda m, n: run_forward(m, config, n)))


def without_numbers(architecture: Architecture) -> nn.Module:
    """The network in the mode of the caller; its initialisation, which may look at numbers, is left out."""
    with no_initialisation():
        return architecture.build()


@contextlib.contextmanager
def no_initialisation() -> Iterator[None]:
    """Inside, ``torch.nn.init`` leaves tensors as they are."""
    names = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    kept = {name: getattr(nn.init, name) for name in names}
    for name in names:
        setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(nn.init, name, function)


def run_forward(model: nn.Module, config: FinetuneConfig, samples: int) -> Tensor:
    """One forward pass with made-up samples, as a training step runs it."""
    if model.kind == "lm":
        return model({"tokens": torch.zeros(samples, config.data.block_size, dtype=torch.int64)})[0]
    size = config.data.image_size
    labels_B = torch.zeros(samples, dtype=torch.int64)
    return model({"images": torch.zeros(samples, 3, size, size), "labels": labels_B})[0]
