"""What training a p-diff baseline would cost, stage by stage, before any weight exists.

Dimensions: B networks, N values of one network, Z latent values.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from common import cli
from common.dry_run import estimate, print_estimate
from common.errors import ConfigError
from common.task import Task
from rpg.codec import TokenCodec
from rpg.cost import DRY_RUN_PROCESSES, codec_of
from rpg.data import build_data
from rpg.pdiff_config import PdiffTrainConfig, StageConfig
from rpg.pdiff_task import VAETask, VectorDiffusionTask


def print_cost(config: PdiffTrainConfig) -> None:
    """Parameters and memory per process of each stage for every plan that fits; nothing is allocated."""
    codec = find_codec(config)
    if not cli.is_main_process():
        return
    length = codec.num_tokens * codec.dim
    print(f"networks of {codec.num_values:,} values, as one vector of {length:,}", file=sys.stderr)
    size = length
    if config.model.has_vae:
        size, padded = config.model.vae.d_latent, config.model.vae.padded_length(length)
        stage = config.vae_training if config.model.has_diffusion else config.training
        print(f"autoencoder: {length:,} values -> {size:,}", file=sys.stderr)
        task = VAETask(length, config.model, seed=config.seed)
        _print_stage(config, stage, task, lambda model, rows: model(torch.zeros(rows, padded)).total)
    if config.model.has_diffusion:
        print(f"diffusion of vectors of {size:,}", file=sys.stderr)

        def forward(model: nn.Module, rows: int) -> Tensor:
            return model(torch.zeros(rows, size), torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, size))

        _print_stage(config, config.training, VectorDiffusionTask(size, config.model, seed=config.seed), forward)


def find_codec(config: PdiffTrainConfig) -> TokenCodec:
    """Of the checkpoints, or of ``architecture`` where there are none.

    Raises: ConfigError if neither is there.
    """
    folder = config.data.folder
    if folder is not None and folder.is_dir():
        return build_data(config.data).codec
    if config.architecture is None:
        raise ConfigError(
            f"data.checkpoints={config.data.checkpoints} is no folder with checkpoints; name the networks by "
            "architecture=<recipe>, architecture=timm:resnet18 or architecture=tokens:1000."
        )
    return codec_of(config.architecture, config)[0]


def _print_stage(
    config: PdiffTrainConfig, stage: StageConfig, task: Task, forward: Callable[[nn.Module, int], object]
) -> None:
    expected = config.ngpus or (cli.world_size() if cli.world_size() > 1 else None)
    trainer = config.trainer_config(stage, Path(config.run_dir), expected or 1)
    micro_sizes = {1: stage.batch_size // stage.accum}
    for processes in [expected] if expected else range(DRY_RUN_PROCESSES, 1, -1):
        if processes > 1 and stage.batch_size % (stage.accum * processes) == 0:
            micro_sizes[processes] = stage.batch_size // (stage.accum * processes)
            break
    print_estimate(estimate(task, trainer, micro_sizes=micro_sizes, forward=forward))
