"""Samples on disk: one JSON object per line with ``tokens`` (ids) and, where there is one, ``text``."""

import json
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError

TOKEN_KEYS = ("tokens", "token_ids", "ids")


@dataclass(frozen=True)
class Sample:
    """One sampled sequence; ``tokens`` is empty if the file holds texts only."""

    tokens: list[int]
    text: str | None


def read_samples(path: Path | str, *, limit: int | None = None) -> list[Sample]:
    """At most ``limit`` samples of a jsonl file (or of a folder's ``samples.jsonl``); blank lines are skipped.

    Raises: DataError for a missing, empty or unreadable file, naming the line.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / "samples.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(
            f"samples={path} cannot be read ({error.strerror}); give the jsonl file that a generate command wrote."
        ) from None
    samples = []
    for number, line in enumerate(lines, start=1):
        if limit is not None and len(samples) >= limit:
            break
        if line.strip():
            samples.append(_sample(line, f"{path}, line {number}"))
    if not samples:
        raise DataError(f"samples={path} is empty; generate some samples first.")
    return samples


def _sample(line: bytes, where: str) -> Sample:
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "it is not JSON"
        raise DataError(f"{where}: {reason}; the file must hold one JSON object per line.") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: {type(record).__name__} found; the file must hold one JSON object per line.")
    tokens = next((record[key] for key in TOKEN_KEYS if key in record), [])
    text = record.get("text")
    if not (isinstance(tokens, list) and all(isinstance(token, int) for token in tokens)):
        raise DataError(f"{where}: 'tokens' must be a list of integers.")
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: 'text' must be a string.")
    if not tokens and text is None:
        raise DataError(f"{where}: neither 'tokens' nor 'text' is there; each line needs one of them.")
    return Sample(tokens, text)
