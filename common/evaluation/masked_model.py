"""A masked-token language model as evaluators see it, and how a paper's loader is found without importing the paper."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from common.data.tokenizer import Tokenizer
from common.errors import ConfigError
from common.evaluation.perplexity import Denoiser, TokenNLL, nll_of

LOADER_FUNCTION = "loading:load_denoiser"  # what `loader=<package>` stands for


@dataclass(frozen=True)
class MaskedLanguageModel:
    """A denoiser and what is needed to feed it text.

    Attributes:
        denoise: ``denoise(tokens_RL, where_RL) -> log_probs_PV``.
        mask_id: id of the mask.
        length: longest sequence, in tokens.
        tokenizer: of its N real tokens.
        device: where the denoiser's inputs go.
        name: for reports.
        nll: NLL of given tokens at masked positions; None: from the denoiser. A model whose mask is an ordinary token
            of the vocabulary needs one, since the denoiser gives that token no probability where a text holds it.
    """

    denoise: Denoiser
    mask_id: int
    length: int
    tokenizer: Tokenizer
    device: torch.device
    name: str = "model"
    nll: TokenNLL | None = None

    @property
    def token_nll(self) -> TokenNLL:
        """``nll``, or what the denoiser says."""
        return self.nll or nll_of(self.denoise)


def leading_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that a Hugging Face tokenizer puts before every text (LLaMA's beginning-of-text token), which ``encode`` of
    our protocol leaves out; empty for GPT-2, Qwen and our own tokenizers."""
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is None:
        return []
    plain = inner("a", add_special_tokens=False)["input_ids"]
    whole = inner("a", add_special_tokens=True)["input_ids"]
    starts = [start for start in range(len(whole) - len(plain) + 1) if whole[start : start + len(plain)] == plain]
    return list(whole[: starts[0]]) if starts else []


def beginning_id(tokenizer: Tokenizer) -> int:
    """What stands before a text that has nothing before it: beginning-of-text, or where there is none end-of-text."""
    inner = getattr(tokenizer, "tokenizer", None)
    bos_id = getattr(inner, "bos_token_id", None)
    return int(tokenizer.eos_id if bos_id is None else bos_id)


def find_loader(name: str) -> Callable[..., MaskedLanguageModel]:
    """The function ``load(path, device, **options) -> MaskedLanguageModel`` called ``package.module:function``.

    A package alone stands for its ``loading:load_denoiser``.

    Raises: ConfigError if there is no such function.
    """
    module_name, _, function = (name if ":" in name else f"{name}.{LOADER_FUNCTION}").partition(":")
    try:
        return getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"loader={name} cannot be used ({error}); give package.module:function, or a package of this repository "
            "such as radd or diffullama."
        ) from None


def load_masked_model(loader: str, path: str, device: torch.device | str, **options: Any) -> MaskedLanguageModel:
    """The model at ``path``, by the loader of that name (see ``find_loader``).

    Raises: ConfigError for an option that the loader does not have, with those it has.
    """
    load = find_loader(loader)
    known = [name for name in inspect.signature(load).parameters if name not in ("path", "device")]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ConfigError(
            f"{unknown[0]}={options[unknown[0]]} is no option of loader={loader}; it has {', '.join(known)}."
        )
    return load(path, device, **options)
