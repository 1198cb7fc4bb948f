"""What ``python -m diffullama.prepare`` writes: cached tokens, packed files, clean text, or pairs of prompt and answer.

Every kind is deterministic, continues where it was stopped, and never replaces a file that it did not write itself:
``.prepare.json`` in the output folder says what the folder is made of and how far it is. (The token cache has a
manifest of its own, ``common/data/cache.py``.)
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from common.checkpoint import write_json
from common.config import require_at_least, require_choice
from common.data.cache import TokenRecipe, load_or_build_tokens, text_chunks
from common.data.corpora import CORPORA, SPLITS, load_data_tokenizer, open_source, parse_name
from common.data.detokenizers import find_detokenizer
from common.data.fingerprint import text_fingerprint
from common.data.hub import load_hub_dataset
from common.data.sources import Source, text_of
from common.data.tokenizer import Tokenizer
from common.errors import ConfigError, DataError
from diffullama.packed import CODES, FILE_NAME, STATE_FILE, PackedWriter, dtype_for
from diffullama.pairs import load_pairs

FORMATS = ("tokens", "packed", "jsonl", "pairs")
DTYPES = ("auto", *(np.dtype(kind).name for kind in CODES.values() if np.dtype(kind).kind in "iu"))
LOCK_FILE = ".prepare.lock"
FORMAT_VERSION = 1  # part of every key: raise it when the same inputs would give other files

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Options of ``python -m diffullama.prepare``."""

    source: str = "embedded"  # as data.train: embedded, a corpus, a hub id, a path or pattern; of pairs also arithmetic
    split: Literal["train", "validation", "test"] = "train"
    format: Literal["tokens", "packed", "jsonl", "pairs"] = "tokens"
    output: str | None = None  # folder of packed, jsonl and pairs; tokens go to cache_dir
    cache_dir: str = "data"  # downloads and token caches
    tokenizer: str | None = None  # of tokens and packed: byte, bpe:<size>, a folder or a hub id
    limit: int | None = None  # packed, jsonl, pairs: so many documents at most
    streaming: bool = True  # packed, jsonl: read a hub data set while it is downloaded
    length: int = 2049  # packed: tokens of the blocks that will be read, labels included
    blocks_per_file: int = 1024  # packed
    prefix: str | None = None  # packed, jsonl: of file names; null: the split
    dtype: str = "auto"  # packed: number type; auto by the vocabulary
    bos: bool = False  # packed: begin every document with the tokenizer's begin-of-text token
    documents_per_file: int = 100_000  # jsonl
    group_size: int | None = None  # tokens: documents packed together for blocks of `length`; must equal the training's
    prompt_column: str = "instruction"  # pairs: of the input; the output has instruction and output
    answer_column: str = "output"
    seed: int = 0  # pairs: of arithmetic
    progress: bool = True

    def __post_init__(self) -> None:
        require_choice("format", self.format, FORMATS)
        require_choice("split", self.split, SPLITS)
        require_choice("dtype", self.dtype, DTYPES)
        for name in ("length", "blocks_per_file", "documents_per_file"):
            require_at_least(name, getattr(self, name), 1)
        for name in ("limit", "group_size"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        if not self.source:
            raise ConfigError("source is empty; name a text (source=embedded needs no download), a path or a hub id.")
        if self.format in ("tokens", "packed") and not self.tokenizer:
            raise ConfigError(f"format={self.format} needs tokenizer=...: byte, bpe:<size>, a folder or a hub id.")
        if self.format != "tokens" and not self.output:
            raise ConfigError(f"format={self.format} needs output=..., a new or empty folder.")
        if self.format == "tokens" and (self.output or self.limit is not None):
            given = "output" if self.output else "limit"
            raise ConfigError(
                f"format=tokens fills the cache that training reads (cache_dir) and takes no {given}; format=jsonl "
                "writes a limited copy of a text, which can then be prepared."
            )

    def file_prefix(self) -> str:
        """What names of files begin with."""
        return self.prefix or self.split


@dataclass(frozen=True)
class Prepared:
    """What there is now.

    Attributes:
        folder: of the files.
        counts: documents, tokens, files, ...
        kept: nothing had to be done.
    """

    folder: Path
    counts: dict[str, Any]
    kept: bool = False

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"
                            for name, value in self.counts.items())  # fmt: skip
        return f"{self.folder}: {numbers}{' (complete already)' if self.kept else ''}"


def prepare(config: PrepareConfig) -> Prepared:
    """Writes what ``config`` asks for, or what is missing of it.

    Raises: ConfigError, DataError.
    """
    if config.format == "tokens":
        return prepare_tokens(config)
    if config.format == "pairs":
        return prepare_pairs(config)
    source = open_stream(config) if config.streaming else open_source(config.source, config.split)
    if config.format == "jsonl":
        return prepare_jsonl(config, source)
    return prepare_packed(
        config, source, load_data_tokenizer(config.tokenizer, config.source, cache_dir=config.cache_dir)
    )


# ---------------------------------------------------------------- sources


class HubStream:
    """Documents of a hub data set, read while they are downloaded; only the text column is kept."""

    num_documents = None

    def __init__(self, name: str, dataset: Any, fields: tuple[str, ...]) -> None:
        self.label, self.dataset, self.fields = name, dataset, fields

    def documents(self) -> Iterator[str]:
        for number, record in enumerate(self.dataset):
            yield text_of(record, self.fields, f"{self.label}, record {number}")

    def fingerprint(self) -> str:
        """By name: the contents of a stream are not known beforehand."""
        return text_fingerprint("hub stream", self.label, *self.fields)


def open_stream(config: PrepareConfig) -> Source:
    """The documents, without a download of the whole where they come from the hub."""
    parsed = parse_name(config.source)
    if parsed.kind not in ("corpus", "hub"):
        return open_source(config.source, config.split, cache_dir=config.cache_dir)
    corpus = CORPORA.get(parsed.name) if parsed.kind == "corpus" else None
    repository, _, version = parsed.target.partition(":")
    split = config.split
    if corpus is not None:
        repository, version = corpus.hub, corpus.config or ""
        if split not in corpus.splits:
            raise ConfigError(f"{parsed.name} has no {split} split, only {', '.join(corpus.splits)}.")
        split = corpus.splits[split]
    stream = load_hub_dataset(repository, version or None, split, cache_dir=None, streaming=True)
    fields = (parsed.column,) if parsed.column else corpus.fields if corpus else ("text",)
    return HubStream(f"{config.source} ({config.split})", stream, fields)


# ---------------------------------------------------------------- the output folder


class OutputFolder:
    """A folder that is filled step by step by one program at a time, and can be continued.

    Args:
        key: digest of everything that the files depend on.

    Raises: DataError if the folder holds something else; ConfigError if another program is filling it.
    """

    def __init__(self, folder: str | Path, key: str, description: dict[str, Any]) -> None:
        self.folder, self.key, self.description = Path(folder).expanduser(), key, description
        self._lock = FileLock(str(self.folder / LOCK_FILE))

    def __enter__(self) -> "OutputFolder":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._refuse_foreign()
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(f"output={self.folder} is being filled by another program; wait for it.") from None
        except OSError as error:
            raise DataError(
                f"output={self.folder} cannot be used ({error.strerror}); choose another folder."
            ) from error
        try:
            self.state = self._read()
        except DataError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        (self.folder / LOCK_FILE).unlink(missing_ok=True)
        self._lock.release()

    @property
    def is_complete(self) -> bool:
        return bool(self.state.get("complete"))

    @property
    def position(self) -> dict[str, int]:
        """Where the files that are there end; empty at the start."""
        return dict(self.state.get("position", {}))

    @property
    def counts(self) -> dict[str, int]:
        """The position as a reader wants it."""
        return {name: value for name, value in self.position.items() if name != "offset"}

    def save(self, position: dict[str, int], *, complete: bool = False) -> None:
        self.state = {
            "made by": "python -m diffullama.prepare",
            "key": self.key,
            **self.description,
            "position": position,
            "complete": complete,
        }
        write_json(self.folder / STATE_FILE, self.state)

    def _read(self) -> dict[str, Any]:
        try:
            state = json.loads((self.folder / STATE_FILE).read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise DataError(f"{self.folder / STATE_FILE} cannot be read ({error}); choose another output.") from error
        if state.get("key") != self.key:
            old, new = {name: state.get(name) for name in self.description}, self.description
            changed = ", ".join(f"{name}: {old[name]} -> {new[name]}" for name in new if old[name] != new[name])
            raise DataError(
                f"output={self.folder} was prepared from other inputs or options "
                f"({changed or 'the contents of the data or tokenizer differ'}); it stays as it is. Choose another "
                "output."
            )
        return state

    def _refuse_foreign(self) -> None:
        if (self.folder / STATE_FILE).exists():
            return
        found = [path.name for path in sorted(self.folder.iterdir()) if path.name != LOCK_FILE]
        if found:
            raise DataError(
                f"output={self.folder} holds {', '.join(found[:3])}, not written by diffullama.prepare; nothing is "
                "overwritten. Choose a new folder."
            )


def _bar(config: PrepareConfig, source: Source, done: int) -> tqdm:
    total = source.num_documents
    if config.limit is not None:
        total = config.limit if total is None else min(total, config.limit)
    return tqdm(
        total=total,
        initial=done,
        desc=f"{config.format} {source.label}",
        unit="doc",
        disable=None if config.progress else True,
    )


def _documents(config: PrepareConfig, source: Source, start: int) -> Iterator[str]:
    """Texts from number ``start`` up to the limit."""
    return islice(source.documents(), start, config.limit)


# ---------------------------------------------------------------- tokens


def prepare_tokens(config: PrepareConfig) -> Prepared:
    """The token cache that ``data.train=`` (and ``cache_dir``) of a training run finds again by its contents."""
    source = open_source(config.source, config.split, cache_dir=config.cache_dir)
    tokenizer = load_data_tokenizer(config.tokenizer, config.source, cache_dir=config.cache_dir)
    label, transform = find_detokenizer("auto", parse_name(config.source).name)
    recipe = TokenRecipe(
        source=source,
        tokenizer=tokenizer,
        transform=transform,
        transform_name=label,
        group_size=config.group_size,
        length=config.length if config.group_size else None,
    )
    stream = load_or_build_tokens(recipe, config.cache_dir, progress=config.progress)
    counts = {"documents": stream.documents, "tokens": stream.total_tokens}
    counts[f"blocks of {config.length}"] = len(stream.tokens) // config.length
    return Prepared(Path(stream.folder), counts)


# ---------------------------------------------------------------- packed files


def prepare_packed(config: PrepareConfig, source: Source, tokenizer: Tokenizer) -> Prepared:
    """LITPKDS files of ``length * blocks_per_file`` tokens, every document closed by end-of-text."""
    begin = begin_token(tokenizer) if config.bos else None
    dtype = dtype_for(tokenizer.vocab_size) if config.dtype == "auto" else np.dtype(config.dtype)
    description = {
        "format": "packed",
        "source": config.source,
        "split": config.split,
        "limit": config.limit,
        "prefix": config.file_prefix(),
        "chunk_size": config.length * config.blocks_per_file,
        "dtype": dtype.name,
        "bos": config.bos,
        "vocab_size": tokenizer.vocab_size,
    }
    key = text_fingerprint(FORMAT_VERSION, source.fingerprint(), tokenizer.fingerprint(), json.dumps(description))
    with OutputFolder(config.output, key, description) as output:
        if output.is_complete:
            return Prepared(output.folder, output.counts, kept=True)
        position = {"documents": 0, "offset": 0, "files": 0} | output.position
        remove_later_files(output.folder, config.file_prefix(), position["files"])
        writer = PackedWriter(
            output.folder,
            config.file_prefix(),
            chunk_size=description["chunk_size"],
            sep_token=tokenizer.eos_id,
            dtype=dtype,
            first_file=position["files"],
        )
        output.save(position)
        number, skip = position["documents"], position["offset"]
        with _bar(config, source, number) as bar:
            for texts in text_chunks(_documents(config, source, number)):
                for ids in tokenizer.encode_batch(texts):
                    ids = np.array([*([] if begin is None else [begin]), *ids, tokenizer.eos_id])
                    if writer.add(ids[skip:]):
                        # What is pending all belongs to this document, so a restart goes on inside it.
                        output.save({"documents": number, "offset": len(ids) - writer.pending, "files": writer.number})
                    number, skip = number + 1, 0
                bar.update(len(texts))
        _require_documents(number, source)
        tokens = writer.number * description["chunk_size"] + writer.pending
        padding = -tokens % description["chunk_size"]
        writer.close()
        counts = {"documents": number, "offset": 0, "files": writer.number, "tokens": tokens, "padding": padding}
        output.save(counts, complete=True)
    return Prepared(output.folder, output.counts)


def remove_later_files(folder: Path, prefix: str, first: int) -> None:
    """Deletes packed files from number ``first`` on: written before a stop, but not yet accounted for."""
    number = first
    while (path := folder / FILE_NAME.format(prefix=prefix, number=number)).exists():
        path.unlink()
        number += 1


def begin_token(tokenizer: Tokenizer) -> int:
    """The begin-of-text id. Raises: ConfigError if the tokenizer has none."""
    begin = getattr(getattr(tokenizer, "tokenizer", None), "bos_token_id", None)
    if begin is None:
        raise ConfigError("bos=true, but the tokenizer has no begin-of-text token; leave bos out.")
    return int(begin)


def _require_documents(number: int, source: Source) -> None:
    if not number:
        raise DataError(f"{source.label} holds no document; it needs at least one.")


# ---------------------------------------------------------------- clean text


def prepare_jsonl(config: PrepareConfig, source: Source) -> Prepared:
    """``clean_<prefix>_00000.jsonl``, ...: one object with nothing but ``text`` for every document that has text.

    The reference keeps FineWeb like this, without ids and metadata.
    """
    description = {
        "format": "jsonl",
        "source": config.source,
        "split": config.split,
        "limit": config.limit,
        "prefix": config.file_prefix(),
        "documents_per_file": config.documents_per_file,
    }
    key = text_fingerprint(FORMAT_VERSION, source.fingerprint(), json.dumps(description))
    with OutputFolder(config.output, key, description) as output:
        if output.is_complete:
            return Prepared(output.folder, output.counts, kept=True)
        position = {"documents": 0, "files": 0, "empty": 0, "characters": 0} | output.position
        texts = _documents(config, source, position["documents"])
        output.save(position)
        with _bar(config, source, position["documents"]) as bar:
            while chunk := list(islice(texts, config.documents_per_file)):
                lines = [json.dumps({"text": text}, ensure_ascii=False) for text in chunk if text.strip()]
                path = output.folder / f"clean_{config.file_prefix()}_{position['files']:05d}.jsonl"
                write_lines(path, lines)
                position = {
                    "documents": position["documents"] + len(chunk),
                    "files": position["files"] + 1,
                    "empty": position["empty"] + len(chunk) - len(lines),
                    "characters": position["characters"] + sum(map(len, chunk)),
                }
                output.save(position)
                bar.update(len(chunk))
        _require_documents(position["documents"], source)
        output.save(position, complete=True)
    return Prepared(output.folder, position)


def write_lines(path: Path, lines: list[str]) -> None:
    """A text file that is either whole or absent."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    temporary.rename(path)


# ---------------------------------------------------------------- pairs


def prepare_pairs(config: PrepareConfig) -> Prepared:
    """``<split>.jsonl`` with ``instruction`` and ``output``: what ``data=pairs`` reads without further options."""
    pairs = load_pairs(
        config.source,
        config.split,
        prompt_column=config.prompt_column,
        answer_column=config.answer_column,
        seed=config.seed,
        cache_dir=config.cache_dir,
    )[: config.limit]
    whole = [(prompt, answer) for prompt, answer in pairs if answer.strip()]
    if not whole:
        raise DataError(f"{config.source} ({config.split}) holds no pair with an answer.")
    description = {"format": "pairs", "source": config.source, "split": config.split, "limit": config.limit}
    columns = {"prompt_column": config.prompt_column, "answer_column": config.answer_column}
    key = text_fingerprint(FORMAT_VERSION, json.dumps(description | columns), json.dumps(pairs))
    counts = {"pairs": len(whole), "without answer": len(pairs) - len(whole)}
    with OutputFolder(config.output, key, description | columns) as output:
        if output.is_complete:
            return Prepared(output.folder, counts, kept=True)
        lines = [json.dumps({"instruction": prompt, "output": answer}, ensure_ascii=False) for prompt, answer in whole]
        write_lines(output.folder / f"{config.split}.jsonl", lines)
        output.save(counts, complete=True)
    return Prepared(output.folder, counts)
