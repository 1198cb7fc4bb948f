"""What training a hypernetwork would cost, before any weight or image exists."""

import sys

from common import cli
from common.dry_run import estimate, print_estimate
from logah.architecture_sets import ArchitectureSource
from logah.config import TrainConfig
from logah.meta_learner import MetaLearner
from logah.networks import Network, build_network
from logah.training import LM_CLASSES, build_task

STEPS_PER_EPOCH = 1000  # epochs have no length without data; no estimate depends on it
DEFAULT_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "folder": 1000}
DEFAULT_VOCABULARY = {"gpt2": 50257, "byte": 257}


def print_cost(config: TrainConfig) -> None:
    """Parameters, and memory per process for every plan; no data are read and no weight is allocated.

    Activations are not counted: they are those of the networks that happen to be drawn, beside which the
    hypernetwork's are small.
    """
    vision = config.data.kind == "vision"
    classes = DEFAULT_CLASSES[config.data.name] if vision else LM_CLASSES
    model = config.model_config(num_classes=classes)
    if vision:
        options = {"num_classes": classes, "image_size": config.data.image_size}
    else:
        options = {"vocab_size": vocabulary(config.data.tokenizer), "n_positions": config.data.block_size}
    source = ArchitectureSource(config.nets, seed=config.seed, data_options=options)
    task = build_task(config, model, source)
    task.build = lambda: MetaLearner(model)
    networks = [build_network(one, model) for one in source.draw(0)]
    processes = config.ngpus or cli.world_size()
    trainer = config.trainer_config(processes, STEPS_PER_EPOCH)

    if cli.is_main_process():
        sizes = ", ".join(f"{size:,}" for size in sorted(num_parameters(network) for network in networks))
        print(f"networks of the first step: {sizes} parameters", file=sys.stderr)
        print_estimate(estimate(task, trainer, micro_sizes={processes: trainer.batch.micro_size}))


def num_parameters(network: Network) -> int:
    """Of the network itself."""
    return sum(parameter.numel() for parameter in network.module.parameters())


def vocabulary(tokenizer: str) -> int:
    """Tokens of a tokenizer that is known without reading it, else GPT-2's."""
    if tokenizer.startswith("bpe:"):
        return int(tokenizer.removeprefix("bpe:"))
    return DEFAULT_VOCABULARY.get(tokenizer, DEFAULT_VOCABULARY["gpt2"])
