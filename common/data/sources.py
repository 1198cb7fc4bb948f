"""Where documents come from: what every source offers, and the sources that need no file.

A source yields texts in a fixed order and knows a fingerprint of its contents, which keys the token cache. Everything
wrong with the input ends in a ``DataError`` that names the file, the place in it and what to do. Files are read by
``local_files.py``, Hugging Face datasets by ``hub.py``.
"""

import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from common.data.fingerprint import text_fingerprint
from common.data.text import docstring_files_fingerprint, embedded_documents
from common.errors import DataError

FIELD_HINT = "Name the one that holds the text after the path: path/*.jsonl::COLUMN."


class Source(Protocol):
    """Documents in a fixed order."""

    label: str  # for messages and cache folders
    num_documents: int | None  # None where counting would mean reading

    def documents(self) -> Iterator[str]:
        """Texts, from the first; every call starts anew."""

    def fingerprint(self) -> str:
        """Hex digest that changes with the documents."""


class DocumentList:
    """Texts held in memory."""

    def __init__(self, texts: Sequence[str], *, label: str = "list") -> None:
        self.texts, self.label, self.num_documents = list(texts), label, len(texts)

    def documents(self) -> Iterator[str]:
        return iter(self.texts)

    def fingerprint(self) -> str:
        return text_fingerprint("list", *self.texts)


class EmbeddedText:
    """``common.data.text.embedded_documents`` as a source."""

    num_documents = None

    def __init__(self, split: str, source: str = "all") -> None:
        self.split, self.source, self.label = split, source, f"embedded-{source}-{split}"

    def documents(self) -> Iterator[str]:
        return iter(embedded_documents(self.split, self.source))

    def fingerprint(self) -> str:
        parts = []
        if self.source != "docstrings":
            parts += embedded_documents(self.split, "topics")
        if self.source != "topics":
            # Hashing the files takes 10 ms where parsing them takes a second; the parser belongs to the version.
            parts += [platform.python_version(), docstring_files_fingerprint()]
        return text_fingerprint("embedded", self.split, self.source, *parts)


def text_of(record: Mapping[str, Any], fields: Sequence[str], place: str) -> str:
    """The text of one record.

    Raises:
        DataError: none of ``fields`` is in it, or the value is not text; ``place`` begins the message.
    """
    for field in fields:
        if field in record:
            value = record[field]
            if not isinstance(value, str):
                raise DataError(f"{place}: field {field!r} holds {type(value).__name__}, not text.")
            return value
    raise DataError(
        f"{place}: has no field {either(fields)}; its fields are {', '.join(record) or 'none'}. {FIELD_HINT}"
    )


def either(names: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in names)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
