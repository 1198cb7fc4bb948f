"""Networks and where their training starts: at random weights, or at the prediction of a trained hypernetwork."""

import functools

import torch
from torch import nn

from logah.architectures import Architecture, gpt2, vit
from logah.checkpoints import load_hypernetwork
from logah.hypernetwork import HyperNetwork
from logah.prediction import fill
from logah.reproduction.settings import VISION, Net, Settings

PATCH_SIZE, IMAGE_SIZE, NUM_CLASSES = 2, 8, 10  # the embedded digits: 16 patches and the class token


def architecture(settings: Settings, kind: str, net: Net) -> Architecture:
    """A vision transformer for the digits or an untied GPT-2; without dropout, so that nothing depends on its draws."""
    if kind == VISION:
        return vit(PATCH_SIZE, net.depth, net.heads, net.width, num_classes=NUM_CLASSES, image_size=IMAGE_SIZE)
    return gpt2(
        net.width, net.depth, net.heads, vocab_size=settings.vocab_size, n_positions=settings.block_size,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip


def random_network(target: Architecture, seed: int) -> nn.Module:
    """A network with the random weights of its own library."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return target.build()


@functools.lru_cache(maxsize=2)
def hypernetwork_of(run_dir: str) -> HyperNetwork:
    """What a run exported, for predictions without noise."""
    return load_hypernetwork(run_dir, class_token_noise=0.0).model


def build_start(settings: Settings, kind: str, net: Net, seed: int, run_dir: str | None) -> nn.Module:
    """A network to be trained or scored.

    Args:
        seed: of random weights; under a prediction, of what no prediction covers.
        run_dir: of the hypernetwork's training; None for random weights.
    """
    network = random_network(architecture(settings, kind, net), seed)
    if run_dir is not None:
        fill(hypernetwork_of(run_dir), network)
    return network
