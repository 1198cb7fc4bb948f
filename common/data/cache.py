"""Token caches: a corpus is tokenized once, written as one memory map, and then only read.

A cache is a folder ``<cache_dir>/tokens/<label>-<key>`` with ``tokens.bin`` (uint16 or uint32, by the size of the
vocabulary) and ``manifest.json``. The key is a digest of everything that the tokens depend on: the source's contents,
the tokenizer, the transformation of the text and the packing. The block length is not among them unless documents are
packed in groups: the stream is the same, and ``TokenDataset`` cuts it.

A builder that is killed or interrupted leaves its tokens and a journal behind, from which the next one goes on.
"""

import contextlib
import errno
import glob
import hashlib
import itertools
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from tqdm import tqdm

from common.data.dataset import TokenStream
from common.data.fingerprint import file_fingerprint, text_fingerprint
from common.data.packing import BlockPacker, join_documents
from common.data.sources import Source
from common.data.tokenizer import Tokenizer
from common.errors import DataError

FORMAT = 1  # part of every key: raise it when the same inputs would give other tokens
TOKENS_FILE, MANIFEST_FILE, JOURNAL_FILE = "tokens.bin", "manifest.json", "journal.json"
JOURNAL_SECONDS = 10.0  # of tokenizing that a kill can cost
REHASH_BYTES = 16 << 20  # read at once of tokens that a killed builder left
CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 1024, 4 << 20  # tokenized at once: bounds memory, feeds all tokenizer threads

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenRecipe:
    """How a corpus becomes tokens.

    Attributes:
        transform: applied to every text before encoding, e.g. a detokenizer.
        transform_name: identifies ``transform`` in the key; required with it.
        group_size, length: pack every so many documents by themselves into blocks of ``length``; both or neither.
        end_of_text: close every document with the tokenizer's end-of-text token; else nothing separates documents.
    """

    source: Source
    tokenizer: Tokenizer
    transform: Callable[[str], str] | None = None
    transform_name: str = "none"
    group_size: int | None = None
    length: int | None = None
    end_of_text: bool = True

    @property
    def separator(self) -> int | None:
        """Id that closes every document."""
        return self.tokenizer.eos_id if self.end_of_text else None

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32)

    def key(self) -> str:
        """Digest of everything that the tokens depend on."""
        packing = f"groups of {self.group_size} into {self.length}" if self.group_size else "one stream"
        if not self.end_of_text:
            packing += ", no end of text"
        return text_fingerprint(
            FORMAT, self.source.fingerprint(), self.tokenizer.fingerprint(), self.transform_name, packing
        )


def load_or_build_tokens(
    recipe: TokenRecipe, cache_dir: str | Path | None, *, progress: bool = True, verify: bool = False
) -> TokenStream:
    """The corpus as tokens: from the cache, else tokenized now and cached.

    Safe with several processes: one builds under a lock, the others wait and read. A cache is complete or absent; one
    that is damaged is rebuilt with a warning.

    Args:
        cache_dir: None keeps the tokens in memory.
        progress: show a bar while tokenizing (on a terminal only).
        verify: compare the whole file's sha256 instead of quick checks (sizes and a digest of sampled windows).

    Raises:
        DataError: unusable input, a full disk or a folder that cannot be written.
    """
    if cache_dir is None:
        counts = _Counts()
        parts = list(_encode(recipe, counts, progress))
        tokens = np.concatenate(parts) if parts else np.empty(0, recipe.dtype)
        return TokenStream(tokens, counts.documents, counts.tokens)
    key = recipe.key()
    root = Path(cache_dir).expanduser() / "tokens"
    folder = root / f"{_safe(recipe.source.label)}-{key[:20]}"
    stream = _open_if_whole(folder, key, verify)
    if stream is not None:
        return stream
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _waiting_lock(root / f".{folder.name}.lock"):
            stream = _open_if_whole(folder, key, verify)  # another process may have built it meanwhile
            if stream is None:
                _build(recipe, key, folder, progress)
                stream = _open_if_whole(folder, key, verify=False)
    except OSError as error:
        reason = "no space is left" if error.errno == errno.ENOSPC else f"{type(error).__name__}: {error.strerror}"
        raise DataError(
            f"The token cache {folder} cannot be written ({reason}); set data.cache_dir to a folder with room. "
            "Nothing that was there has been changed."
        ) from error
    assert stream is not None, f"{folder} was just built"
    return stream


@contextlib.contextmanager
def _waiting_lock(path: Path) -> Iterator[None]:
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except TimeoutError:
        logger.info("Waiting for another process that tokenizes the same corpus (%s).", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _safe(label: str) -> str:
    """``label`` as part of a folder's name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in label).strip(".")[:60] or "corpus"


# ---------------------------------------------------------------- reading


def _open_if_whole(folder: Path, key: str, verify: bool) -> TokenStream | None:
    """The cache in ``folder``, or None where it is absent or (with a warning) damaged."""
    if not folder.is_dir():
        return None
    path = folder / TOKENS_FILE
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        problem = _problem(path, manifest, key, verify)
        if problem is None:
            if manifest["bytes"] == 0:
                tokens = np.empty(0, manifest["dtype"])
            else:
                tokens = np.memmap(path, dtype=manifest["dtype"], mode="r")
            return TokenStream(tokens, manifest["documents"], manifest["tokens"], path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    logger.warning("The token cache %s is damaged (%s) and will be rebuilt.", path, problem)
    return None


def _problem(path: Path, manifest: dict, key: str, verify: bool) -> str | None:
    if manifest["key"] != key:
        return "its manifest belongs to other inputs"
    size = path.stat().st_size
    if size != manifest["bytes"]:
        return f"{size} bytes instead of {manifest['bytes']}"
    if file_fingerprint(path) != manifest["fingerprint"]:
        return "its contents have changed"
    if verify and _sha256(path) != manifest["sha256"]:
        return "its sha256 differs"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---------------------------------------------------------------- building


@dataclass
class _Counts:
    documents: int = 0
    tokens: int = 0
    packer: dict | None = None  # the unfinished block of a group


def text_chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists that are worth a call of a tokenizer and fit in memory."""
    chunk, characters = [], 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if len(chunk) == CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encode(recipe: TokenRecipe, counts: _Counts, progress: bool) -> Iterator[NDArray]:
    """Tokens of the corpus, chunk by chunk; starts after ``counts`` and keeps it at what was yielded.

    Raises:
        DataError: the source holds no document, or the tokenizer yields ids outside its vocabulary.
    """
    source, tokenizer = recipe.source, recipe.tokenizer
    packer = None
    if recipe.group_size is not None:
        assert recipe.length is not None, "packing in groups needs the block length"
        packer = BlockPacker(recipe.length, recipe.separator, group_size=recipe.group_size, dtype=recipe.dtype)
        if counts.packer is not None:
            packer.load_state_dict(counts.packer)
    bar = tqdm(
        total=source.num_documents,
        initial=counts.documents,
        desc=f"tokenizing {source.label}",
        unit="doc",
        disable=None if progress else True,
    )
    with bar:
        for texts in text_chunks(itertools.islice(source.documents(), counts.documents, None)):
            if recipe.transform is not None:
                texts = [recipe.transform(text) for text in texts]
            encoded = tokenizer.encode_batch(texts)
            tokens = join_documents(encoded, recipe.separator)
            if len(tokens) and (tokens.max() >= tokenizer.vocab_size or tokens.min() < 0):
                raise DataError(
                    f"The tokenizer gives id {tokens.max()} for {source.label}, outside its vocabulary "
                    f"0..{tokenizer.vocab_size - 1}; its files do not belong together."
                )
            counts.documents += len(texts)
            counts.tokens += len(tokens)
            bar.update(len(texts))
            if packer is None:
                yield tokens.astype(recipe.dtype)
            else:
                blocks = packer.add(encoded)
                counts.packer = packer.state_dict()
                yield blocks.reshape(-1)
    if not counts.documents:
        raise DataError(f"{source.label} holds no document; it needs at least one.")


def _build(recipe: TokenRecipe, key: str, folder: Path, progress: bool) -> None:
    """Writes the cache beside ``folder`` and renames it into place; goes on where a killed builder stopped."""
    host = socket.gethostname()
    temporary = folder.with_name(f".{folder.name}.tmp-{host}-{os.getpid()}")
    counts, size = _adopt_abandoned(folder, host, temporary, key)
    try:
        path = temporary / TOKENS_FILE
        with path.open("rb") as stream:
            digest = hashlib.sha256()
            while data := stream.read(REHASH_BYTES):
                digest.update(data)
        saved = time.monotonic()
        with path.open("ab") as stream:
            for tokens in _encode(recipe, counts, progress):
                data = tokens.tobytes()
                stream.write(data)
                digest.update(data)
                size += len(data)
                if time.monotonic() - saved >= JOURNAL_SECONDS:
                    _write_journal(temporary, stream, key, counts, size)
                    saved = time.monotonic()
            _flush_to_disk(stream)
        (temporary / JOURNAL_FILE).unlink(missing_ok=True)
        manifest = {
            "format": FORMAT,
            "key": key,
            "source": recipe.source.label,
            "transform": recipe.transform_name,
            "group_size": recipe.group_size,
            "vocab_size": recipe.tokenizer.vocab_size,
            "dtype": recipe.dtype.name,
            "documents": counts.documents,
            "tokens": counts.tokens,
            "bytes": size,
            "sha256": digest.hexdigest(),
            "fingerprint": file_fingerprint(path),
        }
        with (temporary / MANIFEST_FILE).open("w") as stream:
            json.dump(manifest, stream, indent=1)
            _flush_to_disk(stream)
        _put_in_place(temporary, folder)
        shutil.rmtree(temporary, ignore_errors=True)  # there is one only if another node was faster
    except KeyboardInterrupt:
        if not (temporary / JOURNAL_FILE).exists():
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _put_in_place(temporary: Path, folder: Path) -> None:
    if folder.is_dir():  # damaged: processes that still map it keep their pages
        aside = folder.with_name(f"{temporary.name}-damaged")
        os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        os.rename(temporary, folder)
    except OSError:
        # A file system without working locks let another node build the same tokens: keep that one.
        if not (folder / MANIFEST_FILE).is_file():
            raise


def _flush_to_disk(stream) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _write_journal(temporary: Path, stream, key: str, counts: _Counts, size: int) -> None:
    """Says how far the tokens on disk are whole."""
    _flush_to_disk(stream)
    path = temporary / JOURNAL_FILE
    with path.with_suffix(".tmp").open("w") as journal:
        json.dump({"key": key, "bytes": size, "counts": asdict(counts)}, journal)
        _flush_to_disk(journal)
    os.replace(path.with_suffix(".tmp"), path)


def _adopt_abandoned(folder: Path, host: str, temporary: Path, key: str) -> tuple[_Counts, int]:
    """Makes ``temporary`` from the furthest that a killed builder on this machine left, deletes what others left.

    Returns: what is in it, and the size of its tokens in bytes.
    """
    found: list[tuple[int, Path, _Counts]] = []
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.tmp-{glob.escape(host)}-*"):
        pid = leftover.name.rsplit(f"-{host}-", 1)[-1].split("-")[0]
        if pid.isdecimal() and _is_alive(int(pid)):
            continue
        journal = _read_journal(leftover, key)
        if journal is None:
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            found.append((journal[1], leftover, journal[0]))
    found.sort(key=lambda item: item[0])
    for _, leftover, _ in found[:-1]:
        shutil.rmtree(leftover, ignore_errors=True)
    if not found:
        temporary.mkdir()
        (temporary / TOKENS_FILE).touch()
        return _Counts(), 0
    size, leftover, counts = found[-1]
    os.rename(leftover, temporary)
    os.truncate(temporary / TOKENS_FILE, size)  # what came after the journal may be half a chunk
    logger.info("Going on with the tokens of %s after %d documents.", folder.name, counts.documents)
    return counts, size


def _read_journal(leftover: Path, key: str) -> tuple[_Counts, int] | None:
    """What a killed builder's folder holds; None if it cannot be continued."""
    try:
        journal = json.loads((leftover / JOURNAL_FILE).read_text())
        counts, size = _Counts(**journal["counts"]), int(journal["bytes"])
        usable = journal["key"] == key and (leftover / TOKENS_FILE).stat().st_size >= size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (counts, size) if usable else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
