"""Tokens that a text is given, as users write them: text, ids, or a mapping from positions to either."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.data.tokenizer import Tokenizer
from common.errors import ConfigError, DataError


def to_ids(option: str, value: str | Iterable[int] | int, tokenizer: Tokenizer | None) -> list[int]:
    """Ids of a text, or given ids as they are.

    Raises: ConfigError for text without a tokenizer, or anything else than text and ids.
    """
    if isinstance(value, str):
        if value and tokenizer is None:
            raise ConfigError(f"{option}={value!r} is text, but the model has no tokenizer; give a list of ids.")
        return tokenizer.encode(value) if value else []
    ids = [value] if isinstance(value, int) else value
    if isinstance(value, bool) or not isinstance(ids, list | tuple) or not all(type(i) is int for i in ids):
        raise ConfigError(f"{option}={value!r} must be text, an id or a list of ids.")
    return list(ids)


def read_fixed(value: Any, tokenizer: Tokenizer | None) -> dict[int, int]:
    """``{position: id}`` from ``{position: text or id or ids}``; longer values run on to the right."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        value = read_json("fixed", value)
    if not isinstance(value, Mapping):
        raise ConfigError(f'fixed={value!r} must map positions to text or ids, for example \'{{"10": " the"}}\'.')
    fixed: dict[int, int] = {}
    for key, entry in value.items():
        try:
            position = int(key)
        except (TypeError, ValueError):
            raise ConfigError(f"fixed: {key!r} is not a position; positions are whole numbers from 0.") from None
        for offset, token in enumerate(to_ids(f"fixed[{position}]", entry, tokenizer)):
            if fixed.setdefault(position + offset, token) != token:
                raise ConfigError(f"fixed: position {position + offset} is given twice with different ids.")
    return fixed


def read_json(option: str, text: str) -> Any:
    """JSON given directly or as the name of a .json file.

    Raises: ConfigError for text that is not JSON; DataError for a file that cannot be read.
    """
    source = f"{option}={text!r}"
    if text.endswith(".json"):
        try:
            source, text = text, Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{option}={source}: cannot be read ({error}).") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source} is not JSON ({error}); quote it once for the shell and once for JSON.") from error
