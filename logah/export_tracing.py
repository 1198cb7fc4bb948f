"""Version 2 of the graph: parameters and operations of an exported program, joined by the edges that data really take.

`torch.export` runs the model once on fake tensors (on meta as well as on real parameters) and yields a list of its
operations with the path of the module that called each. That list is walked once, forward, carrying for every value the
graph nodes that it comes from (its *sources*); an operation without a node of its own passes on the sources of its
operands, so nothing has to be removed or repaired afterwards.

Differences from the reference graph: the output embedding follows the last norm, the class token is a node, and a
parameter used twice stands once for each use (the second time unlisted), so that the graph has no cycle.
"""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node as Operation

from common.errors import ConfigError
from logah.export_rules import Rules
from logah.net_graph import NetGraph
from logah.tracing_inputs import is_language_model, made_image_size

logger = logging.getLogger(__name__)

TEXT_LENGTH = 4  # tokens of the example of a language model; the graph is the same for any length above 1


def trace_exported(
    model: nn.Module,
    *,
    variant: str = "auto",
    attention: str = "explicit",
    ve_cutoff: int = 50,
    inputs: Any = None,
    image_size: int | Sequence[int] | None = None,
) -> NetGraph:
    """The graph of ``model`` from its exported program.

    Args:
        model: in any mode, on any device, also meta; it is exported in evaluation mode, so auxiliary heads that only
            train have no nodes.
        variant: ``vision``, ``llm``, or ``auto``: ``llm`` for a model that reads token numbers.
        attention: ``explicit``: every attention has a node; ``as_is``: only one that spells out its softmax.
        ve_cutoff: longest path that becomes a virtual edge.
        inputs: example: a tensor, a sequence of arguments or a mapping of keyword arguments; None: zeros of the model's
            image size, or token numbers.
        image_size: of the example image; None: what the model expects.

    Raises: ConfigError for a model that cannot be exported, with the module and operation where it stopped.
    """
    if variant == "auto":
        variant = "llm" if is_language_model(model) else "vision"
    if next(model.parameters(), None) is None:
        raise ConfigError(f"{type(model).__name__} has no parameters, so there is nothing to predict for it.")
    arguments, keywords = example(model, variant, inputs, image_size)
    program = export(model, arguments, keywords)
    rules = Rules(model, variant=variant, attention=attention)
    walk(program, rules)
    return rules.graph(ve_cutoff)


def example(model: nn.Module, variant: str, inputs: Any, image_size: Any) -> tuple[tuple, dict]:
    """Arguments and keyword arguments to export ``model`` with."""
    device = next(model.parameters()).device
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Sequence):
        return tuple(inputs), {}
    if variant == "llm":
        ids_BL = torch.ones(2, TEXT_LENGTH, dtype=torch.int64, device=device)
        has_cache = hasattr(getattr(model, "config", None), "use_cache")
        return (), {"input_ids": ids_BL} | ({"use_cache": False} if has_cache else {})
    channels = getattr(getattr(model, "config", None), "num_channels", None) or 3
    return (torch.zeros(2, channels, *_sides(model, image_size), device=device),), {}


def _sides(model: nn.Module, image_size: int | Sequence[int] | None) -> tuple[int, int]:
    if image_size is None:
        return made_image_size(model)
    return (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[-1])


def export(model: nn.Module, arguments: tuple, keywords: dict) -> ExportedProgram:
    """The program of ``model``'s evaluation; modes and hooks of the model are afterwards as before.

    Raises: ConfigError.
    """
    path: list[str] = []
    with evaluating(model), following(model, path), plain_attention(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(model, arguments, keywords, strict=False)
        except Exception as error:  # whatever a model's own code raises
            raise ConfigError(_failure(model, path, error)) from error


def _failure(model: nn.Module, path: list[str], error: Exception) -> str:
    text = " ".join(str(error).split())
    operation = re.search(r"(?:aten|prims|torchvision)[.:]+\w+", text)
    module = next((name for name in reversed(path) if name), "") or "the model itself"
    kind = type(model.get_submodule(module)).__name__ if module != "the model itself" else type(model).__name__
    return (
        f"graph_version=v2: {type(model).__name__} cannot be exported: module {module} ({kind}), operation "
        f"{operation[0] if operation else type(error).__name__}: {text[:200]} Give inputs=... that the model accepts, "
        "or trace it with graph_version=reference."
    )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def following(model: nn.Module, path: list[str]) -> Iterator[None]:
    """Keeps in ``path`` the names of the modules whose forward is running, outermost first."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: path.append(name)))
        handles.append(module.register_forward_hook(lambda *_: leave(path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def leave(path: list[str]) -> None:
    """Returns nothing, as the hook that it serves must: a value would replace the module's output."""
    path.pop()


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as separate operations: PyTorch's fused encoder layer hides its parameters' order of use."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def walk(program: ExportedProgram, rules: Rules) -> None:
    """Applies ``rules`` to the operations of ``program`` in order."""
    signature = program.graph_signature
    parameters, constants = signature.inputs_to_parameters, set(signature.inputs_to_buffers)
    constants |= set(signature.inputs_to_lifted_tensor_constants)
    for operation in program.graph.nodes:
        if operation.op == "placeholder":
            if operation.name in parameters:
                rules.read_parameter(operation, parameters[operation.name])
            elif operation.name not in constants and isinstance(operation.meta.get("val"), Tensor):
                rules.read_input(operation)
        elif operation.op == "call_function":
            rules.apply(operation)
        elif operation.op == "output":
            rules.finish(_operands(operation))


def _operands(operation: Operation) -> list[Operation]:
    return list(operation.all_input_nodes)
