"""Which ids mean mask, padding and separator in each family, and embedding rows for tokens that are added.

The released models use existing rare tokens as masks; any other model has to be told (``mask_token_id`` or
``add_mask_token``). Source: specification 3.2.

Dimensions: V rows of the embedding, D width.
"""

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from common.errors import ConfigError

MASK_TOKEN = "<|mask|>"  # spelling of an added mask token; the released gpt2-medium model spells it [¨M¨]


@dataclass(frozen=True)
class SpecialTokens:
    """Ids with a meaning of their own; None where a model has none.

    Attributes:
        mask_id: stands for an unknown token; None for a purely autoregressive model.
        bos_id: opens a sequence; with shift it is what the first token is predicted from.
        eos_id: closes a document or an answer.
        pad_id: fills up fine-tuning examples; a token like others, which the model learns to predict.
        sep_id: between prompt and answer.
    """

    mask_id: int | None
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    sep_id: int | None = None

    def to_dict(self) -> dict[str, int | None]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Family:
    """What a released model uses. Source: table of specification 3.2.

    Attributes:
        mask_id: None where the mask has to be added first.
        pad_id: None: the end-of-text id.
        sep_id: None: the id of ``sep_token``.
        isolates_digits: fine-tuning text becomes one token per digit.
    """

    name: str
    mask_id: int | None
    pad_id: int | None
    sep_id: int | None = None
    sep_token: str | None = None
    isolates_digits: bool = False


FAMILIES = {
    "gpt2": Family("gpt2", mask_id=10541, pad_id=None, sep_id=50155),
    "gpt2-medium": Family("gpt2-medium", mask_id=50257, pad_id=101, sep_token="======", isolates_digits=True),
    "llama2": Family("llama2", mask_id=811, pad_id=30399, sep_id=4936),
}


def find_family(model_config: Any, tokenizer: Tokenizer | None = None) -> Family | None:
    """The released family that a transformers configuration belongs to, by its sizes; None for any other model.

    A model of a family's size whose tokenizer has another vocabulary is none of it.
    """
    kind, rows = getattr(model_config, "model_type", None), getattr(model_config, "vocab_size", 0)
    known = None if tokenizer is None else tokenizer.vocab_size
    if kind == "gpt2" and known in (None, 50257, 50258):
        sizes = (model_config.n_embd, model_config.n_layer)
        if sizes == (768, 12) and rows == 50257:
            return FAMILIES["gpt2"]
        if sizes == (1024, 24) and rows in (50257, 50258):
            return FAMILIES["gpt2-medium"]
    if kind == "llama" and rows == 32000 and known in (None, 32000):
        return FAMILIES["llama2"]
    return None


def resolve_special_tokens(
    tokenizer: Tokenizer | None,
    model_config: Any,
    *,
    mask_token_id: int | None = None,
    add_mask_token: bool = False,
    require_mask: bool = True,
) -> SpecialTokens:
    """The special tokens of a model, from what is given, stored in its configuration, its tokenizer, or its family.

    Needs no weights, so that a wrong id is found before a model is loaded.

    Args:
        tokenizer: None: the configuration alone decides.
        model_config: a transformers configuration; ``mask_token_id`` and ``special_tokens`` in it are ours.
        mask_token_id: an existing id to be used as the mask.
        add_mask_token: the mask is the tokenizer's mask token, or the next free id (see ``add_mask_token``).
        require_mask: False: no mask is needed, and one that cannot be found is None.

    Raises: ConfigError if the mask is unknown, outside the embedding, or has another meaning already.
    """
    raw = getattr(tokenizer, "tokenizer", None)  # of transformers, behind our protocol
    stored = getattr(model_config, "special_tokens", None) or {}
    family = find_family(model_config, tokenizer)
    rows = int(model_config.vocab_size)

    def named(name: str) -> int | None:
        for value in (stored.get(name), getattr(raw, f"{name[:-3]}_token_id", None)):
            if value is not None:
                return int(value)
        return None

    eos = named("eos_id")
    if eos is None:
        eos = tokenizer.eos_id if tokenizer is not None else _first(getattr(model_config, "eos_token_id", None))
    bos = named("bos_id")
    if bos is None:
        bos = _first(getattr(model_config, "bos_token_id", None))
    bos = eos if bos is None or bos >= rows else bos  # the end of one document is the beginning of the next
    pad, sep = stored.get("pad_id"), stored.get("sep_id")
    if family is not None:
        pad = pad if pad is not None else family.pad_id if family.pad_id is not None else eos
        sep = sep if sep is not None else family.sep_id
        if sep is None and family.sep_token and raw is not None:
            sep = raw.convert_tokens_to_ids(family.sep_token)
    pad = named("pad_id") if pad is None else pad
    pad = eos if pad is None else pad
    sep = named("sep_id") if sep is None else sep
    mask = _mask_id(tokenizer, raw, model_config, family, mask_token_id, add_mask_token, require_mask)
    special = SpecialTokens(mask, bos, eos, pad, sep)
    check_special_tokens(special, rows, can_grow=add_mask_token)
    return special


def _first(value: int | list[int] | None) -> int | None:
    return int(value[0]) if isinstance(value, list | tuple) and value else None if isinstance(value, list) else value


def _mask_id(
    tokenizer: Tokenizer | None,
    raw: Any,
    model_config: Any,
    family: Family | None,
    given: int | None,
    add: bool,
    required: bool,
) -> int | None:
    if given is not None and add:
        raise ConfigError(
            f"mask_token_id={given} and add_mask_token=true contradict each other; give an existing id, or have a "
            "token added."
        )
    own = getattr(raw, "mask_token_id", None)
    if given is not None:
        return int(given)
    if getattr(model_config, "mask_token_id", None) is not None:
        return int(model_config.mask_token_id)
    if own is not None:
        return int(own)
    stored = (getattr(model_config, "special_tokens", None) or {}).get("mask_id")
    if stored is not None and not add:  # an autoregressive parent whose tokenizer cannot hold a mask token
        return int(stored)
    if add:
        return tokenizer.vocab_size if tokenizer is not None else int(model_config.vocab_size)
    needs_new = family is not None and family.mask_id is not None and family.mask_id >= model_config.vocab_size
    if family is not None and not needs_new:
        return family.mask_id
    if not required:
        return None
    kind = getattr(model_config, "model_type", "model")
    raise ConfigError(
        f"the mask token of this {kind} model ({model_config.vocab_size} embedding rows) is unknown: its tokenizer "
        "has none, and its configuration names none. Give a rare existing id with mask_token_id=..., or "
        "add_mask_token=true for a new one."
    )


def check_special_tokens(special: SpecialTokens, rows: int, *, can_grow: bool = False) -> None:
    """Raises ConfigError unless the mask is one of ``rows`` ids and no other special token."""
    mask = special.mask_id
    if mask is None:
        return
    if mask < 0 or (mask >= rows and not can_grow):
        raise ConfigError(
            f"mask_token_id={mask} is outside the model's {rows} embedding rows (0..{rows - 1}); choose an id below, "
            "or add_mask_token=true."
        )
    for name in ("eos", "pad", "bos"):
        if getattr(special, f"{name}_id") == mask:
            raise ConfigError(
                f"mask_token_id={mask} is the {name} token too, so that the model could not tell them apart; choose "
                "another id (a rare token), or add_mask_token=true."
            )


# ---------------------------------------------------------------- new tokens


def noisy_mean_rows(weight: Tensor, noise: Tensor) -> Tensor:
    """Rows for new tokens, ``(n, D)``: the mean of the existing rows plus N(0, 1/D).

    Args:
        weight: existing rows ``(V, D)``.
        noise: standard normals ``(n, D)``.
    """
    return weight.mean(dim=0) + noise / torch.tensor(weight.shape[1]).sqrt()


@torch.no_grad()
def add_mask_token(hf_model: nn.Module, tokenizer: Tokenizer | None, generator: torch.Generator) -> int:
    """Gives model and tokenizer a mask token, in place; returns its id.

    A tokenizer of transformers gets a new special token spelled ``MASK_TOKEN``; with the byte tokenizer the mask is the
    model's alone. The embedding grows only if it has no row to spare (Qwen2.5 has); the mask's row, and that of an
    untied head, become the mean of the rows in use plus noise.

    Args:
        hf_model: a transformers ``*ForCausalLM``.
        generator: of the noise.
    """
    weight_VD = hf_model.get_input_embeddings().weight
    raw = getattr(tokenizer, "tokenizer", None)
    if raw is not None and raw.mask_token_id is not None and raw.mask_token_id < len(weight_VD):
        return int(raw.mask_token_id)
    if raw is not None:
        if raw.mask_token_id is None:
            raw.add_special_tokens({"mask_token": MASK_TOKEN})
        if isinstance(tokenizer, HuggingFaceTokenizer):
            tokenizer.vocab_size = len(raw)
        mask_id = int(raw.mask_token_id)
    else:
        mask_id = tokenizer.vocab_size if tokenizer is not None else len(weight_VD)
    used = min(mask_id, len(weight_VD))
    if mask_id >= len(weight_VD):
        hf_model.resize_token_embeddings(mask_id + 1, mean_resizing=False)
    embedding, head = hf_model.get_input_embeddings().weight, hf_model.get_output_embeddings().weight
    for matrix_VD in (embedding,) if head is embedding else (embedding, head):
        noise = torch.randn(mask_id + 1 - used, matrix_VD.shape[1], generator=generator).to(matrix_VD.device)
        matrix_VD[used : mask_id + 1] = noisy_mean_rows(matrix_VD[:used].float(), noise).to(matrix_VD.dtype)
    return mask_id


def isolate_digits(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of ``text`` with every digit a token of its own, as gpt2-medium's fine-tuning encodes it."""
    pieces = [piece for piece in re.split(r"(\d)", text) if piece]
    return [token for ids in tokenizer.encode_batch(pieces) for token in ids]
