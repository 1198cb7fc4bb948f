"""The hypernetwork as the engine trains it: one forward pass gives the loss of a whole meta-batch."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from logah.hypernetwork import PLACEHOLDERS, HyperNetwork
from logah.model_config import HyperNetworkConfig
from logah.networks import Network
from logah.objective import MetaLoss, meta_loss

SMALL = 1 << 20


class MetaLearner(HyperNetwork):
    """A hypernetwork whose forward pass predicts networks, runs them and returns their loss.

    The loss lies inside the wrapped module, so that the gradient hooks of DDP and FSDP2 see every use of a weight.
    """

    def __init__(self, config: HyperNetworkConfig) -> None:
        super().__init__(config)
        if config.decoder == "lowrank" and not config.use_1d_decoder:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(not name.startswith(PLACEHOLDERS))

    def forward(
        self, networks: Sequence[Network], batches: Sequence[Mapping[str, Tensor]], **options: object
    ) -> tuple[Tensor, MetaLoss]:
        """The loss, and what it is made of; ``options`` are those of ``meta_loss``."""
        found = meta_loss(self, networks, batches, **options)
        return found.total + 0 * self._rarely_used(), found

    def _rarely_used(self) -> Tensor:
        """A sum of the decoders' small tensors: networks without a class layer, for example, do not use all of them,
        and every process must have a gradient for the same parameters."""
        names = ("decoder", "decoder_1d", "bias_class")
        rare = [p for name in names if hasattr(self, name) for p in getattr(self, name).parameters()]
        return torch.stack([p.sum() for p in rare if p.requires_grad and p.numel() <= SMALL]).sum()
