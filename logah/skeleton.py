"""Networks without the weights that a prediction supplies.

A skeleton holds its covered parameters on the meta device, where they cost nothing, and everything else (parameters
that no node of the graph gives, buffers) on the CPU with its usual initial values, drawn from a seed.
"""

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from common.errors import ConfigError
from common.seeding import derive_seed

_LOCK = threading.Lock()  # registration hooks are global to the process


def build_skeleton(build: Callable[[], nn.Module], covered: Collection[str], *, seed: int = 0) -> nn.Module:
    """The network that ``build`` makes, with the parameters named ``covered`` on the meta device.

    ``build`` runs on the CPU. Each covered parameter moves to the meta device when it is registered, before its module
    initialises it, so neither its memory nor its random numbers are spent; what stays is drawn as ``torch`` and the
    network's own code draw it.

    Args:
        build: makes the same modules in the same order each time it is called.
        covered: every name of a tied parameter.
        seed: of the initial values.

    Raises: ConfigError if a name is none of the network's.
    """
    places = registration_places(build)
    unknown = sorted(set(covered) - places.keys())
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no parameter of the network that was built.")
    moved = {places[name] for name in covered}
    counter = iter(range(1 << 60))

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None:
            return None
        if next(counter) in moved and parameter.device.type != "meta":
            return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        return None

    with torch.random.fork_rng(devices=[]), _registrations(to_meta):
        torch.manual_seed(derive_seed(seed, "uncovered parameters"))
        with torch.device("cpu"):
            skeleton = build()
    _require_real(skeleton, set(covered))
    return skeleton


def registration_places(build: Callable[[], nn.Module]) -> dict[str, int]:
    """For each parameter name, the number of the registration that made it, counted over one run of ``build``."""
    order: dict[int, int] = {}
    kept: list[nn.Parameter] = []  # ids stay unique while the objects live
    counter = iter(range(1 << 60))

    def note(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None:
            return None
        place = next(counter)
        if parameter.device.type == "meta":  # a tied one, registered again
            return None
        moved = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        order[id(moved)] = place
        kept.append(moved)
        return moved

    with torch.random.fork_rng(devices=[]), _registrations(note), torch.device("cpu"):
        model = build()
    return {name: order[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


@contextlib.contextmanager
def _registrations(hook: Callable) -> Iterator[None]:
    with _LOCK:
        handle = register_module_parameter_registration_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def _require_real(skeleton: nn.Module, covered: set[str]) -> None:
    """Everything that no prediction supplies has values."""
    tensors: list[tuple[str, Tensor]] = [*skeleton.named_parameters(remove_duplicate=False), *skeleton.named_buffers()]
    for name, tensor in tensors:
        if tensor.device.type == "meta" and name not in covered:
            raise ConfigError(f"{name} has no values although no prediction covers it; its network cannot be built.")


def own_values(skeleton: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers that have values, by every name."""
    named = [*skeleton.named_parameters(remove_duplicate=False), *skeleton.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in named if tensor.device.type != "meta"}
