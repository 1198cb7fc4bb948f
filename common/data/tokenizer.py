"""Tokenizers behind one small protocol: bytes, byte-pair encoding trained here, and any Hugging Face tokenizer.

``encode`` never adds special tokens: packing appends the end-of-text id to each document. ``decode`` accepts every id
below ``vocab_size`` in any order, because a sampler may produce any of them.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from common.data.sources import first_line
from common.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
BYTE_CONFIG_FILE = "byte_tokenizer.json"
MIN_BPE_VOCAB = 257  # 256 bytes and the end-of-text token
MAX_BPE_CHARACTERS = 200_000_000  # ``bpe:N`` learns from the first so many: enough for any N, and fits in memory

logger = logging.getLogger(__name__)


@runtime_checkable
class Tokenizer(Protocol):
    """What data, samplers and evaluators use of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """N: ids are 0..N-1 (a mask token, if any, is the model's and has id N)."""

    @property
    def eos_id(self) -> int:
        """Id of the end-of-text token that closes every document."""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` without special tokens."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``[encode(text) for text in texts]``, faster."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of any ids below ``vocab_size``, special tokens spelled out."""

    def fingerprint(self) -> str:
        """Hex digest that changes whenever an encoding could change; keys the token cache."""

    def save(self, folder: str | Path) -> Path:
        """Writes a folder that ``load_tokenizer`` loads; returns it."""


def _checked_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """``ids`` as plain integers (tensors and arrays welcome).

    Raises:
        DataError: an id outside 0..vocab_size-1.
    """
    values = ids.tolist() if hasattr(ids, "tolist") else [int(i) for i in ids]
    for value in values:
        if not 0 <= value < vocab_size:
            hint = " (the mask token has no text)" if value == vocab_size else ""
            raise DataError(
                f"Token id {value} is outside the vocabulary 0..{vocab_size - 1}{hint}; "
                "decode ids of finished sequences made with this tokenizer."
            )
    return values


class ByteTokenizer:
    """UTF-8 bytes clipped to 0..127: N = 128, end-of-text id 0, no training, no files.

    ASCII text without NUL and DEL survives a round trip. Every byte of a non-ASCII character becomes 127, which
    decodes to U+FFFD; a NUL character in a text reads as end-of-text.
    """

    vocab_size = 128
    eos_id = 0

    _clip = bytes(min(value, 127) for value in range(256))
    _characters = [END_OF_TEXT, *map(chr, range(1, 127)), "\N{REPLACEMENT CHARACTER}"]

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace").translate(self._clip))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join([self._characters[value] for value in _checked_ids(ids, self.vocab_size)])

    def fingerprint(self) -> str:
        return hashlib.sha256(b"bytes clipped to 127, end-of-text 0").hexdigest()

    def save(self, folder: str | Path) -> Path:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BYTE_CONFIG_FILE).write_text(json.dumps({"type": "byte", "vocab_size": 128, "eos_id": 0}) + "\n")
        return folder


class HuggingFaceTokenizer:
    """A ``transformers`` tokenizer behind our protocol.

    Text that contains a special token's spelling (``<|endoftext|>``) encodes to that token, as in the reference.

    Args:
        tokenizer: a ``PreTrainedTokenizerBase`` with an end-of-text token.

    Raises:
        DataError: the tokenizer has no end-of-text token.
    """

    def __init__(self, tokenizer) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"Tokenizer {tokenizer.name_or_path!r} has no end-of-text token (eos_token), which closes every packed "
                "document; set eos_token in its tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.eos_id = int(tokenizer.eos_token_id)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: documents longer than the model's context are meant to be cut later, by packing.
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoded["input_ids"]

    def decode(self, ids: Iterable[int]) -> str:
        values = _checked_ids(ids, self.vocab_size)
        return self.tokenizer.decode(values, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def fingerprint(self) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            content = backend.to_str()
        else:
            content = json.dumps([type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())])
        return hashlib.sha256(f"{self.eos_id}\n{content}".encode()).hexdigest()

    def save(self, folder: str | Path) -> Path:
        folder = Path(folder)
        self.tokenizer.save_pretrained(str(folder))
        return folder


def train_bpe(documents: Iterable[str], vocab_size: int, *, min_frequency: int = 2) -> HuggingFaceTokenizer:
    """Byte-level byte-pair encoding learnt from ``documents``; end-of-text has id 0.

    Deterministic: the same documents give the same merges on every machine. All 256 bytes are in the vocabulary, so
    any text encodes without an unknown token and decodes back to itself.

    Args:
        documents: training texts, read once.
        vocab_size: N, the end-of-text token included; at least 257. A corpus with too few repeated pairs gives fewer.
        min_frequency: pairs seen less often are not merged.

    Raises:
        ConfigError: ``vocab_size`` below 257.
        DataError: no document.
    """
    from tokenizers import Tokenizer as RawTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_BPE_VOCAB:
        raise ConfigError(
            f"The byte-pair vocabulary has {vocab_size} entries but needs at least {MIN_BPE_VOCAB} "
            f"(256 bytes and {END_OF_TEXT}); 1024 to 4096 suit a small corpus."
        )
    iterator = iter(documents)
    try:
        first = next(iterator)
    except StopIteration:
        raise DataError("The byte-pair tokenizer got no document to learn from; give it a source with text.") from None

    def texts() -> Iterable[str]:
        yield first
        yield from iterator

    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts(), trainer=trainer)
    tokenizer = HuggingFaceTokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END_OF_TEXT))
    if tokenizer.vocab_size < vocab_size:
        logger.warning(
            "The corpus supports %d byte-pair tokens only, not the %d asked for; set tokens=%d.",
            tokenizer.vocab_size,
            vocab_size,
            tokenizer.vocab_size,
        )
    return tokenizer


def load_tokenizer(
    name: str | Path,
    *,
    documents: Iterable[str] | None = None,
    cache_dir: str | Path | None = None,
) -> Tokenizer:
    """The tokenizer called ``name``.

    Args:
        name: ``"byte"``; ``"bpe:N"`` (trained on the first 200 M characters of ``documents``); a folder written by
            ``save`` or by transformers; or a name on the Hugging Face hub such as ``"gpt2"``.
        documents: what ``bpe:N`` learns from; by default the embedded training text.
        cache_dir: where a trained ``bpe:N`` is kept; the same documents then load it again.

    Raises:
        ConfigError: ``bpe:`` without a usable number.
        DataError: folder or hub name that cannot be loaded; the message says how to use a local folder.
    """
    name = str(name)
    if name == "byte":
        return ByteTokenizer()
    if name.startswith("bpe:"):
        return _load_or_train_bpe(name, documents, cache_dir)
    folder = Path(name).expanduser()
    if (folder / BYTE_CONFIG_FILE).is_file():
        return ByteTokenizer()
    if folder.is_dir():
        return _from_folder(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"Tokenizer folder {name!r} does not exist; give an existing folder, 'byte' or 'bpe:N'.")
    return _from_hub(name)


def _from_folder(folder: Path) -> HuggingFaceTokenizer:
    from transformers import AutoTokenizer

    try:
        return HuggingFaceTokenizer(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
    except DataError:
        raise
    except Exception as error:  # transformers and tokenizers raise many types for a missing or damaged file
        present = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise DataError(
            f"Folder {folder} holds no tokenizer that loads ({first_line(error)}); it has: {present}. "
            "It needs tokenizer.json with tokenizer_config.json, or vocab.json with merges.txt."
        ) from error


def _from_hub(name: str) -> HuggingFaceTokenizer:
    from transformers import AutoTokenizer

    try:
        return HuggingFaceTokenizer(AutoTokenizer.from_pretrained(name))
    except DataError:
        raise
    except Exception as error:  # offline, unknown name, gated, damaged cache: the remedy is the same
        raise DataError(
            f"Tokenizer {name!r} is neither a local folder nor loadable from the hub ({first_line(error)}). "
            "Without hub access, copy its files (tokenizer.json or vocab.json and merges.txt) to a folder and give "
            "that path; 'byte' and 'bpe:N' need no download."
        ) from error


def _load_or_train_bpe(name: str, documents: Iterable[str] | None, cache_dir: str | Path | None) -> Tokenizer:
    text = name.removeprefix("bpe:")
    if not text.isdecimal():
        raise ConfigError(f"tokenizer={name!r}: after 'bpe:' comes the vocabulary size, for example bpe:2048.")
    vocab_size = int(text)
    if documents is None:
        from common.data.text import embedded_documents

        documents = embedded_documents("train")
    texts = _first_texts(documents, MAX_BPE_CHARACTERS)
    if cache_dir is None:
        return train_bpe(texts, vocab_size)
    digest = hashlib.sha256(f"bpe {vocab_size}\n".encode())
    for document in texts:
        digest.update(hashlib.sha256(document.encode("utf-8", errors="replace")).digest())
    folder = Path(cache_dir) / "tokenizers" / f"bpe{vocab_size}-{digest.hexdigest()[:16]}"
    if (folder / "tokenizer.json").is_file():
        return _from_folder(folder)
    tokenizer = train_bpe(texts, vocab_size)
    save_tokenizer(tokenizer, folder)
    return tokenizer


def _first_texts(documents: Iterable[str], characters: int) -> list[str]:
    """Documents from the first until ``characters`` are reached."""
    texts = []
    for text in documents:
        texts.append(text)
        characters -= len(text)
        if characters <= 0:
            break
    return texts


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> Path:
    """Saves so that ``folder`` is either complete or absent, also with several processes at once.

    An existing folder is kept as it is: a run's tokenizer never changes.
    """
    folder = Path(folder)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tokenizer.save(temporary)
        temporary.chmod(0o755)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # not another process that was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
