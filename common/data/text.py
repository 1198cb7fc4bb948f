"""Real English text that ships inside every CPython: language-reference topics and standard-library docstrings.

It needs no network and no licence beyond Python's, so that the quick start, the tests and the small reproductions run
anywhere. The text depends on the Python version only.
"""

import ast
import hashlib
import inspect
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Literal

from common.errors import ConfigError, DataError

SPLITS = ("train", "test")
SOURCES = ("topics", "docstrings", "all")
TEST_PERIOD, TEST_REMAINDER = 10, 5  # document i is a test document when i % 10 == 5

# Packages present in every build (tkinter, distutils or idlelib are not), in the order in which they are read.
DOCSTRING_PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "ctypes",
    "email",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
    "xmlrpc",
)


def embedded_documents(
    split: Literal["train", "test"] = "train", source: Literal["topics", "docstrings", "all"] = "all"
) -> list[str]:
    """Documents of the embedded text, in a stable order; every tenth (index % 10 == 5) belongs to the test split.

    Args:
        split: ``"train"`` or ``"test"``; no document is in both.
        source: ``"topics"`` are the texts of ``pydoc_data.topics`` in sorted key order, ``"docstrings"`` one document
            per file of the standard library, ``"all"`` topics followed by docstrings (each split by itself).

    Raises:
        ConfigError: another split or source.
        DataError: the standard library's source files are not installed as files.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r} of the embedded text must be one of {', '.join(SPLITS)}.")
    if source not in SOURCES:
        raise ConfigError(f"embedded text source {source!r} must be one of {', '.join(SOURCES)}.")
    parts = []
    if source in ("topics", "all"):
        parts.append(topic_documents())
    if source in ("docstrings", "all"):
        parts.append(docstring_documents())
    in_test = split == "test"
    return [
        text
        for documents in parts
        for index, text in enumerate(documents)
        if (index % TEST_PERIOD == TEST_REMAINDER) == in_test
    ]


@lru_cache(maxsize=1)
def topic_documents() -> tuple[str, ...]:
    """All texts of ``pydoc_data.topics`` (79 documents, 466 kB in CPython 3.11), in sorted key order."""
    from pydoc_data.topics import topics

    return tuple(topics[name] for name in sorted(topics))


@lru_cache(maxsize=1)
def docstring_documents() -> tuple[str, ...]:
    """One document per standard-library file: its docstrings in source order, separated by blank lines.

    Files are parsed, never imported. A docstring that an earlier file already had is left out, so that copied methods
    cannot carry training text into the test split.

    Raises:
        DataError: the standard library is not installed as source files (a zipped or frozen Python).
    """
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    documents = []
    for path in _docstring_files(root):
        texts = []
        for text in _docstrings(path):
            if text and text not in seen:
                seen.add(text)
                texts.append(text)
        if texts:
            documents.append("\n\n".join(texts) + "\n")
    if not documents:
        raise DataError(
            f"The standard library at {root} holds no source files to take docstrings from; "
            "use source='topics' or local text files."
        )
    return tuple(documents)


def docstring_files_fingerprint() -> str:
    """Digest of the files that ``docstring_documents`` reads, without parsing them."""
    root = Path(sysconfig.get_path("stdlib"))
    digest = hashlib.sha256()
    for path in _docstring_files(root):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _docstring_files(root: Path) -> list[Path]:
    """Public top-level modules, then the fixed packages; sorted by name inside each."""
    files = sorted(path for path in root.glob("*.py") if not path.name.startswith("_"))
    for package in DOCSTRING_PACKAGES:
        names = sorted(path.relative_to(root).as_posix() for path in (root / package).rglob("*.py"))
        files += [root / name for name in names if not {"test", "tests"} & set(name.split("/"))]
    return files


def _docstrings(path: Path) -> list[str]:
    """Docstrings of a file's module, classes and functions in source order."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            return
        text = ast.get_docstring(node, clean=False)
        if text:
            found.append(inspect.cleandoc(text))
        for child in node.body:
            visit(child)

    visit(ast.parse(path.read_bytes(), filename=str(path)))
    return found
