"""What training a generator would cost, and drawing one network from it, before any checkpoint or weight exists.

Dimensions: L tokens, D values of a token, R rows.
"""

import re
import sys

import torch
from torch import Tensor, nn

from common import cli
from common.dry_run import estimate, print_estimate
from common.errors import ConfigError, DataError
from rpg.codec import TokenCodec
from rpg.config import TrainConfig
from rpg.data import build_data
from rpg.denoiser import row_flops
from rpg.model import Generator
from rpg.model_config import GeneratorConfig
from rpg.sampling import NOISE_BLOCK
from rpg.sources import find_sources
from rpg.structure import structure_of_shapes
from rpg.task import GeneratorTask
from rpg.training import build_task, network_for
from rpg.zoo.networks import NetworkSection, matching, skeleton
from rpg.zoo.recipes import load_recipe, recipe_names

DRY_RUN_PROCESSES = 8  # for which sharded plans are shown unless ngpus says how many
CLASS_BITS = 10
ROWS_PER_PASS = 512


def print_cost(config: TrainConfig) -> None:
    """Parameters, operations per step and memory per process for every plan; no weight is read or allocated.

    The data are those of ``data.checkpoints`` if they are there, else networks like ``architecture``.
    """
    task, network, codec = plan_task(config)
    # made of nothing: tensors of the data would not mix with those that have only shapes
    task.build = lambda: Generator(network, torch.empty(network.num_tokens, network.d_model))
    expected = config.ngpus or (cli.world_size() if cli.world_size() > 1 else None)
    trainer = config.trainer_config(expected or 1)
    training = config.training
    micro_sizes = {1: training.batch_size // training.accum}
    for processes in [expected] if expected else range(DRY_RUN_PROCESSES, 1, -1):
        if processes > 1 and training.batch_size % (training.accum * processes) == 0:
            micro_sizes[processes] = training.batch_size // (training.accum * processes)
            break

    def forward(model: nn.Module, networks: int) -> Tensor:
        return run_forward(model, task, networks)

    if cli.is_main_process():
        print(
            f"networks of {codec.num_values:,} values: {codec.num_tokens} tokens of {codec.dim} ({codec.fill:.1%} "
            "filled)",
            file=sys.stderr,
        )
        print_estimate(estimate(task, trainer, micro_sizes=micro_sizes, forward=forward))
        print(describe_generation(config, network), file=sys.stderr)


def plan_task(config: TrainConfig) -> tuple[GeneratorTask, GeneratorConfig, TokenCodec]:
    """The task for estimates.

    Raises: ConfigError if there are neither checkpoints nor a known architecture.
    """
    folder = config.data.folder
    if folder is not None and folder.is_dir():
        try:
            data = build_data(config.data)
        except DataError:
            if config.architecture is None:
                raise
        else:
            network = network_for(config, data)
            used = network.condition != "none"
            sources = find_sources(data.group_K, data.condition_KC if used else None, use_states=network.num_states > 0)
            return build_task(config, network, data.codec, sources), network, data.codec
    if config.architecture is None:
        raise ConfigError(
            f"data.checkpoints={config.data.checkpoints} is no folder with checkpoints; name the networks by "
            "architecture=<recipe>, architecture=timm:resnet18 or architecture=tokens:1000."
        )
    codec, count = codec_of(config.architecture, config)
    conditional = config.model.get("condition", "none") != "none"
    states = count if config.effective_states == "groups" and config.data.groups == "file" else 1
    network = config.generator_config(
        num_tokens=codec.num_tokens,
        num_states=states if config.effective_states == "groups" else 0,
        condition_size=CLASS_BITS if conditional else 0,
    )
    condition_KE = torch.zeros(1, CLASS_BITS) if conditional else None
    sources = find_sources(torch.zeros(1, dtype=torch.int64), condition_KE, use_states=network.num_states > 0)
    return build_task(config, network, codec, sources), network, codec


def codec_of(architecture: str, config: TrainConfig) -> tuple[TokenCodec, int]:
    """Tokens of networks that nobody has, and how many checkpoints there would be.

    Args:
        architecture: a recipe, the name of a network, or ``tokens:N``.

    Raises: ConfigError for a name that is none of them.
    """
    count, section = 1, config.data
    if counted := re.fullmatch(r"tokens:(\d+)", architecture):
        values = max(2, int(counted[1]) * section.dim_per_token)
        state = {"all": torch.empty(values, device="meta")}
    elif architecture in recipe_names():
        recipe = load_recipe(architecture)
        if recipe.method == "adapters":
            raise ConfigError(
                f"architecture={architecture}: the size of adapters depends on their language model; give "
                "architecture=tokens:N."
            )
        count = recipe.saving.count
        state = skeleton(recipe.network).state_dict()
        if patterns := recipe.saving.collected:
            state = {name: state[name] for name in matching(list(state), patterns, "recipe.saving.collected")}
    else:
        state = skeleton(NetworkSection(name=architecture, num_classes=1000)).state_dict()
    return TokenCodec(structure_of_shapes(state), section.dim_per_token, section.granularity), count


def run_forward(model: nn.Module, task: GeneratorTask, networks: int) -> Tensor:
    """One forward pass with made-up tokens, as a training step runs it."""
    config, rows = task.config, networks * task.tokens_per_network
    runs = 1 if task.shared and len(task.sources) == 1 else networks
    options: dict[str, object] = {}
    if config.num_states:
        options["state_B"] = torch.zeros(runs, dtype=torch.int64)
    if config.condition != "none":
        options["condition_BE"] = torch.zeros(runs, config.condition_size)
    if config.head == "diffusion":
        options["t_R"] = torch.zeros(rows, dtype=torch.int64)
        options["eps_RD"] = torch.zeros(rows, config.dim_per_token)
        options["rows_per_pass"] = task.rows_per_pass
    source_R = torch.zeros(rows, dtype=torch.int64)
    return model(torch.zeros(rows, config.dim_per_token), source_R, source_R.clone(), **options)


def describe_generation(config: TrainConfig, network: GeneratorConfig) -> str:
    """One line on what drawing one network takes."""
    if network.head == "mse":
        return "one network: a single pass of the stack"
    evaluations = config.sampling.evaluations(network.diffusion_steps)
    rows = -(-network.num_tokens // NOISE_BLOCK) * NOISE_BLOCK
    flops = evaluations * rows * row_flops(network.channels, network.kernel_size, network.dim_per_token)
    widest = max(network.channels)
    memory = 4 * min(rows, ROWS_PER_PASS) * network.dim_per_token * widest * 3  # input, output and a copy of a level
    return (
        f"one network: {evaluations} evaluations of {network.num_tokens} tokens, {flops / 1e12:.3g} TFLOP; about "
        f"{memory / 2**30:.2g} GiB beside the weights at {ROWS_PER_PASS} tokens a pass in float32"
    )
