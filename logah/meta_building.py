"""Networks without numbers: built on the ``meta`` device, whatever their constructors compute on the way.

A module moved by ``Module.to("meta")`` gets one new parameter per place, so weights that were tied no longer are, and
its computational graph changes. Hence a network is built there in the first place, or moved place by place.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

META = torch.device("meta")


class _WeightsOnMeta(TorchFunctionMode):
    """``torch.empty``, which layers allocate their weights with, makes meta tensors; all other numbers are real."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = META
        return function(*args, **kwargs)


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """The network that ``build`` returns, with every parameter and buffer on ``meta`` and tied weights still tied.

    Neither memory nor random numbers are spent on weights. Where a constructor reads numbers off tensors, which meta
    tensors do not have (the schedule of drop rates of RegNet), it runs again with only its weights on ``meta``.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with META:
                network = build()
        except (RuntimeError, NotImplementedError):
            with _WeightsOnMeta():
                network = build()
    return move_to_meta(network)


def move_to_meta(network: nn.Module) -> nn.Module:
    """``network`` itself, each of its tensors replaced by one on ``meta``; places that shared a tensor still do."""
    moved: dict[int, Tensor] = {}

    def meta_of(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            bare = tensor.detach().to(META)
            is_parameter = isinstance(tensor, nn.Parameter)
            moved[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if is_parameter else bare
        return moved[id(tensor)]

    for module in network.modules():
        for places in (module._parameters, module._buffers):
            for name, tensor in places.items():
                if tensor is not None and not tensor.is_meta:
                    places[name] = meta_of(tensor)
    return network
