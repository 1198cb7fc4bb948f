"""One forward pass for tracing: which input a network takes, and the outputs that carry gradients.

Dimensions: B=2 images (batch norms in training mode need more than one), C channels, S image size.
"""

import inspect
import linecache
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import ConfigError

BATCH = 2
DEFAULT_IMAGE_SIZE = 224
INCEPTION_IMAGE_SIZE = 299
TOKENS = (1, 2, 3)
"""Any ids give the same graph; more than one, because a single token has no attention."""


def is_language_model(model: nn.Module) -> bool:
    """Whether it reads token ids."""
    return "input_ids" in inspect.signature(model.forward).parameters


def run_model(model: nn.Module, *, inputs: Any = None, image_size: int | Sequence[int] | None = None) -> list[Tensor]:
    """Output tensors of one forward pass, in order, with an autograd graph that holds no activations.

    The network stays as it was: batch statistics go to copies of the buffers, frozen parameters are frozen again, the
    global random generator is not moved.

    Args:
        inputs: a tensor, a sequence of positional or a mapping of keyword arguments; None makes random-free ones.
        image_size: side or (height, width) of made images; None asks the network.

    Raises: ConfigError naming the module and the operation where the forward pass fails.
    """
    first = next(model.parameters(), None)
    if first is None:
        raise ConfigError(f"{type(model).__name__} has no parameters: there is nothing to trace or predict.")
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(_all_trainable(model))
        stack.enter_context(_without_padding_checks(model))
        stack.enter_context(_without_recomputation(model))
        stack.enter_context(_plain_linear())
        if first.device.type != "meta":
            # the graph is read, never run backwards: activations are let go as soon as they are saved
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda _: None, _never_unpacked))
        try:
            if hasattr(model, "get_var"):
                return list(tensors_of(model.get_var()))
            arguments, keywords = _arguments(model, first, inputs, image_size)
            buffers = {} if first.device.type == "meta" else {n: b.clone() for n, b in model.named_buffers()}
            if model.training and buffers:
                outputs = torch.func.functional_call(model, buffers, arguments, keywords)
            else:
                outputs = model(*arguments, **keywords)
        except Exception as error:
            raise ConfigError(_failure(model, error)) from error
    return list(tensors_of(getattr(outputs, "logits", None) if _has_logits(model, outputs) else outputs))


def tensors_of(outputs: Any) -> Iterator[Tensor]:
    """Tensors of nested tuples, lists and mappings; everything else is left out."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from tensors_of(value)
    elif isinstance(outputs, list | tuple):
        for value in outputs:
            yield from tensors_of(value)


def made_image_size(model: nn.Module) -> tuple[int, int]:
    """(height, width) a classifier expects: its own statement, else 224 (Inception: 299)."""
    candidates = (
        getattr(model, "expected_input_sz", None),
        getattr(model, "image_size", None),
        getattr(getattr(model, "patch_embed", None), "img_size", None),  # timm
        (getattr(model, "pretrained_cfg", None) or {}).get("input_size"),  # timm: (channels, height, width)
        getattr(getattr(model, "config", None), "image_size", None),  # transformers
    )
    for candidate in candidates:
        if candidate is not None:
            return _pair(candidate)
    inception = type(model).__name__.lower().startswith("inception")
    return _pair(INCEPTION_IMAGE_SIZE if inception else DEFAULT_IMAGE_SIZE)


def _has_logits(model: nn.Module, outputs: Any) -> bool:
    """GoogLeNet and Inception name their outputs ``logits`` and ``aux_logits``: there all are traversed."""
    return isinstance(getattr(outputs, "logits", None), Tensor) and (
        is_language_model(model) or not isinstance(outputs, tuple)
    )


def _arguments(model: nn.Module, first: Tensor, inputs: Any, image_size: Any) -> tuple[tuple, dict[str, Any]]:
    if inputs is not None:
        if isinstance(inputs, Mapping):
            return (), dict(inputs)
        return (tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)), {}
    if is_language_model(model):
        # without a cache, transformers looks for packed sequences, which asks meta tensors for their values
        cached = {"use_cache": True} if "use_cache" in inspect.signature(model.forward).parameters else {}
        return (), {"input_ids": torch.tensor([TOKENS], device=first.device), **cached}
    channels = getattr(getattr(model, "config", None), "num_channels", None) or _stem_channels(model)
    sides = made_image_size(model) if image_size is None else _pair(image_size)
    return (torch.zeros(BATCH, channels, *sides, dtype=first.dtype, device=first.device),), {}


def _stem_channels(model: nn.Module) -> int:
    """1 for a network whose first convolution reads grey images, else 3."""
    stem = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return 1 if stem is not None and stem.in_channels == 1 else 3


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    sides = tuple(int(side) for side in size)[-2:]
    return sides if len(sides) == 2 else (sides[0], sides[0])


@contextmanager
def _all_trainable(model: nn.Module) -> Iterator[None]:
    """Frozen parameters have no place in an autograd graph; they do in the graph of the network."""
    frozen = [p for p in model.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _without_padding_checks(model: nn.Module) -> Iterator[None]:
    """transformers compares ids with ``pad_token_id``, which asks meta tensors for their values."""
    config = getattr(model, "config", None)
    if getattr(config, "pad_token_id", None) is None:
        yield
        return
    padding, config.pad_token_id = config.pad_token_id, None
    try:
        yield
    finally:
        config.pad_token_id = padding


@contextmanager
def _without_recomputation(model: nn.Module) -> Iterator[None]:
    """transformers' activation checkpointing hides whole blocks from the autograd graph."""
    recomputed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    for module in recomputed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in recomputed:
            module.gradient_checkpointing = True


@contextmanager
def _plain_linear() -> Iterator[None]:
    """DeepSpeed's ZeRO-3 replaces ``linear`` for the whole process by a function of its own, one node with other
    parents; a network's graph must not depend on what runs beside it."""
    replaced = nn.functional.linear
    nn.functional.linear = torch._C._nn.linear
    try:
        yield
    finally:
        nn.functional.linear = replaced


def _never_unpacked(_: None) -> Tensor:
    raise AssertionError("the graph of a trace is never run backwards")


def _failure(model: nn.Module, error: Exception) -> str:
    """Which module and which line failed."""
    where, line = type(model).__name__, ""
    paths = {id(module): path for path, module in model.named_modules()}
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in paths:
            where = f"module {paths[id(owner)] or '(root)'} ({type(owner).__name__})"
        if not frame.f_globals.get("__name__", "").startswith(("torch.", "logah.")):
            code = linecache.getline(frame.f_code.co_filename, number).strip()
            line = f", operation `{code}`" if code else line
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"{type(model).__name__} cannot be traced: {where}{line} failed with {type(error).__name__}: {reason}. Pass "
        "inputs that fit the network (inputs=, image_size=), or build it with real tensors if the operation needs "
        "values that meta tensors do not have."
    )
