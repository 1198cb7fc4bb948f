"""Which tokens see which: from causal to full attention (annealing), in the form each attention backend takes.

Dimensions: B batch, L sequence.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from common.config import require_at_least
from common.errors import ConfigError

TAKES_BOOL_MASK = ("sdpa",)  # eager *adds* a mask to the scores: 0 and 1 would shift them instead of blocking
TAKES_4D_MASK = ("eager", "sdpa")  # flash kernels and flex_attention do not

logger = logging.getLogger(__name__)


def anneal_ratio(global_step: int, anneal_steps: int) -> float:
    """Share of the future that a position may see: min(1, (completed steps + 1) / anneal_steps).

    ``anneal_steps=1`` switches annealing off. Source: specification 3.5.
    """
    require_at_least("anneal_steps", anneal_steps, 1)
    return min(1.0, (global_step + 1) / anneal_steps)


def annealed_allowed(u: Tensor, ratio: float | Tensor) -> Tensor:
    """allowed_LL: query i may attend to key j where j <= i, or where ``u[i, j] < ratio``.

    Args:
        u: uniforms in [0, 1), ``(L, L)``; one matrix serves all rows, heads and layers.
        ratio: 0 leaves the causal triangle, 1 opens everything.

    Source: specification 3.5.
    """
    return torch.ones_like(u, dtype=torch.bool).tril() | (u < ratio)


def same_document(document_BL: Tensor) -> Tensor:
    """allowed ``(B, 1, L, L)``: positions see those with their own document number only; ``&`` with an annealed mask.

    Position ids do not separate packed documents once attention is not causal. Source: specification 3.4 (e), 9.1.
    """
    return (document_BL[:, :, None] == document_BL[:, None, :])[:, None]


def to_additive(allowed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The mask that is added to attention scores: 0 where allowed, the most negative finite number elsewhere."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


def attention_arguments(
    implementation: str, dtype: torch.dtype, allowed: Tensor | None, visible_BL: Tensor | None, causal: bool
) -> dict[str, Any]:
    """Keyword arguments with which a transformers backbone attends as asked.

    Without masks full attention is a keyword only, so that flash kernels are eligible; a 2D mask or none at all would
    be causal. Booleans reach sdpa only, because eager attention would add them to the scores.

    Args:
        implementation: ``config._attn_implementation``.
        dtype: of the attention scores.
        allowed: bool, query by key: ``(L, L)``, ``(1, 1, L, L)`` or ``(B, 1, L, L)``; None: full or causal.
        visible_BL: bool; padding is False and seen by no other position. None: everything is visible.
        causal: only without ``allowed``.

    Source: specification 3.4. Raises: ConfigError if the backend cannot take such a mask.
    """
    if allowed is None:
        mask = None if visible_BL is None else visible_BL.long()
        return {"attention_mask": mask, "is_causal": causal}
    require_mask_support(implementation)
    if allowed.dim() == 2:
        allowed = allowed[None, None]
    if visible_BL is not None:
        own = torch.eye(allowed.shape[-1], dtype=torch.bool, device=allowed.device)  # no row without any key
        allowed = (allowed & visible_BL[:, None, None, :]) | own
    mask = allowed if implementation in TAKES_BOOL_MASK else to_additive(allowed, dtype)
    return {"attention_mask": mask, "is_causal": False}


def require_mask_support(implementation: str) -> None:
    """Raises ConfigError if the backend cannot take an annealed or document mask."""
    if implementation not in TAKES_4D_MASK:
        raise ConfigError(
            f"attn_implementation={implementation} takes no annealed or document mask; anneal under sdpa and switch "
            "when the ratio has reached 1, or set objective.anneal_steps=1."
        )


def set_attention(hf: nn.Module, implementation: str) -> None:
    """Switches the backend of a transformers model in place, e.g. to flash kernels once nothing is masked any more.

    Raises: ConfigError if the package or the hardware for it is missing, or the model does not support it.
    """
    try:
        hf.set_attn_implementation(implementation)
    except (ImportError, ValueError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"attn_implementation={implementation} cannot be used with {type(hf).__name__} "
            f"({str(error).strip().splitlines()[0][:200]}); use sdpa, or install requirements-gpu.txt."
        ) from None
    if hf.config._attn_implementation != implementation:
        raise ConfigError(
            f"attn_implementation={implementation} is not supported by {type(hf).__name__}, which stays with "
            f"{hf.config._attn_implementation}; use sdpa or eager."
        )


def require_attention(hf: nn.Module, implementation: str) -> None:
    """Raises ConfigError if a transformers model cannot be switched to the backend; it stays with its own."""
    current = hf.config._attn_implementation
    set_attention(hf, implementation)
    set_attention(hf, current)


def open_sliding_window(hf: nn.Module) -> int | None:
    """Lets every layer see the whole sequence, in place; returns the window that was there.

    Mistral, Qwen2 and Qwen3 may look back a limited number of tokens. Under full attention such a window would hide
    both ends of a long sequence, and an annealed mask overrides it anyway, so that the model would change when
    annealing ends. Sequences up to the window see no difference.
    """
    config = hf.config
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or []
    if window is None and "sliding_attention" not in layers:
        return None
    config.sliding_window = None
    if hasattr(config, "use_sliding_window"):
        config.use_sliding_window = False
    if layers:
        config.layer_types = ["full_attention" if kind == "sliding_attention" else kind for kind in layers]
    for module in hf.modules():  # layers read it once, when they are made
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = None
        if getattr(module, "has_sliding_layers", False):
            module.has_sliding_layers = False
    logger.warning(
        "%s looks back %s tokens only; as a diffusion model all its layers see the whole sequence.",
        type(hf).__name__,
        window,
    )
    return window


# ---------------------------------------------------------------- probes


@torch.no_grad()
def sees_the_future(model: nn.Module, vocab_size: int | None = None, *, length: int = 4, causal: bool = False) -> bool:
    """Whether the first position's logits move when the last token is changed: the information-flow probe.

    The model is probed in the mode it is in. In training, both passes see the same dropout.

    Args:
        model: a ``DiffusionLM``.
        vocab_size: ids to probe with are below it; None: the model's.

    Source: specification 3.4 (d).
    """
    device = next(model.parameters()).device
    vocab_size = vocab_size or model.vocab_size
    tokens_1L = torch.arange(length, device=device).remainder(max(vocab_size - 1, 1))[None]
    changed_1L = tokens_1L.clone()
    changed_1L[0, -1] = (changed_1L[0, -1] + 1) % vocab_size
    logits = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for probe_1L in (tokens_1L, changed_1L):
            _dropout_generator(device).manual_seed(0)
            logits.append(model(probe_1L, causal=causal)[0, 0])
    return not torch.equal(*logits)


def _dropout_generator(device: torch.device) -> torch.Generator:
    """The device's global generator; ``torch.manual_seed`` would seed those of all other devices too, for good."""
    return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator


@contextlib.contextmanager
def _probed_attention(hf: nn.Module | None) -> Iterator[None]:
    """sdpa in place of flash kernels, which run on GPUs in half precision only; the arguments are the same."""
    implementation = "" if hf is None else hf.config._attn_implementation
    if "flash" not in implementation:
        yield
        return
    set_attention(hf, "sdpa")
    try:
        yield
    finally:
        set_attention(hf, implementation)


def require_bidirectional(model: nn.Module, vocab_size: int | None = None) -> None:
    """Checks at start-up that a ``DiffusionLM`` runs its library model as meant, on two short sequences.

    Raises: ConfigError if the model is still causal, sees the future in its causal (baseline) mode, or computes its
        logits by more than a linear head.
    """
    with _probed_attention(getattr(model, "hf", None)):
        _require_bidirectional(model, vocab_size)


def _require_bidirectional(model: nn.Module, vocab_size: int | None) -> None:
    name = type(getattr(model, "hf", model)).__name__
    try:
        is_open = sees_the_future(model, vocab_size)
    except (TypeError, AttributeError) as error:
        raise ConfigError(
            f"{name} cannot be run with full attention ({str(error).splitlines()[0][:200]}); use a GPT-2, LLaMA, "
            "Qwen2, Qwen3 or Mistral model."
        ) from None
    if not is_open:
        raise ConfigError(
            f"{name} is still causal: changing the last token does not move the first position's logits. Use "
            "attn_implementation=sdpa or eager, and a model class of transformers whose attention honours is_causal."
        )
    if sees_the_future(model, vocab_size, causal=True):
        raise ConfigError(
            f"{name} sees the future in causal mode; its attention ignores is_causal=True, so that no autoregressive "
            "baseline can be computed with it. Use attn_implementation=sdpa or eager."
        )
    if hasattr(model, "hf"):
        _require_linear_head(model, name)


@torch.no_grad()
def _require_linear_head(model: nn.Module, name: str) -> None:
    tokens_1L = torch.arange(4, device=next(model.parameters()).device)[None] % model.vocab_size
    was_training = model.training
    model.eval()
    try:
        expected = model.hf(input_ids=tokens_1L, use_cache=False, is_causal=True).logits.float()
        found = model(tokens_1L, causal=True).float()
    finally:
        model.train(was_training)
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().amax()) + 1e-6):
        raise ConfigError(
            f"{name} computes its logits by more than a linear head (scaling or capping), which is not supported; use "
            "a GPT-2, LLaMA, Qwen2, Qwen3 or Mistral model."
        )
