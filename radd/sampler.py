"""RADD's network as the samplers of ``common/diffusion/samplers.py`` see it.

    sampler = DiffusionSampler(network(model), schedule, method="tweedie", steps=1024)

Dimensions: R sequences in flight, L positions.
"""

from torch import nn

from common.diffusion.absorbing import Denoiser
from common.diffusion.samplers import Network


def denoiser(model: nn.Module) -> Denoiser:
    """The network as a function (tokens_RL, where_RL) -> log-probabilities at the chosen positions."""
    return lambda tokens_RL, where_RL: model(tokens_RL, where=where_RL)


def network(model: nn.Module) -> Network:
    """A ``RADD`` in eval mode for samplers; ``model.mask_id`` is the number of real tokens."""
    return Network(denoiser(model), model.mask_id, model.mask_id, next(model.parameters()).device)
