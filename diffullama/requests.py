"""What is to be written: canvases with given tokens, from a prompt, a prefix and a suffix, fixed tokens or a file.

Dimensions: L positions.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.data.tokenizer import Tokenizer
from common.diffusion.canvas import build_canvas
from common.errors import ConfigError, DataError
from common.generation.given import read_fixed, to_ids
from diffullama.special_tokens import SpecialTokens, isolate_digits

PROMPT_FIELDS = ("prompt", "prefix", "instruction")
LABEL_FIELDS = ("label", "response", "output", "answer")
TEMPLATES = ("plain", "sft")


@dataclass(frozen=True)
class Prompt:
    """What is given of one text, before tokenization; ``label`` is what a reference answer says, if there is one."""

    prefix: str | Sequence[int] = ""
    suffix: str | Sequence[int] = ""
    fixed: Any = None
    label: str | None = None


@dataclass(frozen=True)
class Request:
    """One text to be written.

    Attributes:
        tokens_L: ids; the mask, or for the released samplers 0, at free positions.
        free_L: bool, positions to be filled.
        label: see ``Prompt``.
    """

    tokens_L: Tensor
    free_L: Tensor
    label: str | None = None


def read_prompts(path: str) -> list[Prompt]:
    """Prompts of a file: lines of a .txt, or objects of a .jsonl with ``prompt`` and optionally ``suffix``, ``label``.

    ``prefix`` and ``instruction`` stand for ``prompt``; ``response``, ``output`` and ``answer`` for ``label``.

    Raises: DataError if the file cannot be read, is empty, or a line is none of that.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts={path} cannot be read ({error}); give a .txt or .jsonl file.") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if not path.endswith((".jsonl", ".json")):
            prompts.append(Prompt(line))
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"prompts={path}, line {number} is not JSON ({error}); write one object per line."
            ) from error
        names = [name for name in PROMPT_FIELDS if isinstance(entry, Mapping) and name in entry]
        if not names:
            raise DataError(
                f"prompts={path}, line {number} has none of the fields {', '.join(PROMPT_FIELDS)}; add one of them."
            )
        label = next((entry[name] for name in LABEL_FIELDS if name in entry), None)
        prompts.append(Prompt(entry[names[0]], entry.get("suffix", ""), entry.get("fixed"), label))
    if not prompts:
        raise DataError(f"prompts={path} holds no prompt; write one per line.")
    return prompts


def begin_id(special: SpecialTokens) -> int:
    """The id at position 0: begin-of-text, or end-of-text where a family has no other.

    Raises: ConfigError if the model has neither.
    """
    for token in (special.bos_id, special.eos_id):
        if token is not None:
            return token
    raise ConfigError("bos=true, but the model has no begin- or end-of-text id; give a prompt and bos=false.")


def build_request(
    prompt: Prompt,
    special: SpecialTokens,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    length: int,
    max_new_tokens: int | None = None,
    bos: bool = True,
    template: str = "plain",
    digits: bool = False,
) -> Request:
    """The canvas of one text.

    Args:
        length: positions in all, used unless ``max_new_tokens`` is given.
        max_new_tokens: free positions between prefix and suffix.
        bos: whether position 0 holds the begin-of-text token; fixed positions count from behind it.
        template: ``plain``: bos + prefix; ``sft``: bos + prefix + separator, the layout of fine-tuning.
        digits: with ``sft``, every digit of a prefix given as text is a token of its own, as in fine-tuning.

    Raises: ConfigError for what does not fit the length or the vocabulary, or text without a tokenizer.
    """
    begin = [begin_id(special)] if bos else []
    given = prompt.prefix
    if template == "sft" and digits and tokenizer is not None and isinstance(given, str):
        given = isolate_digits(tokenizer, given)
    prefix = [*begin, *to_ids("prompt", given, tokenizer)]
    if template == "sft":
        if special.sep_id is None:
            raise ConfigError("template=sft, but the model has no separator id (sep_id); use template=plain.")
        prefix.append(special.sep_id)
    suffix = to_ids("suffix", prompt.suffix, tokenizer)
    fixed = {position + len(begin): token for position, token in read_fixed(prompt.fixed, tokenizer).items()}
    if max_new_tokens is not None:
        length = len(prefix) + max_new_tokens + len(suffix)
    # A vocabulary id serves as the mask in some families. The text may hold it, so free positions are kept apart.
    unused = vocab_size
    tokens_L = build_canvas(1, length, unused, num_tokens=vocab_size, prefix=prefix, suffix=suffix, fixed=fixed)[0]
    free_L = tokens_L == unused
    return Request(torch.where(free_L, special.mask_id, tokens_L), free_L, prompt.label)
