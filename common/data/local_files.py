"""Documents of local txt, jsonl and parquet files."""

import glob
import gzip
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.data.fingerprint import file_fingerprint, text_fingerprint
from common.data.sources import FIELD_HINT, either, text_of
from common.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

TextUnit = Literal["file", "paragraph", "line", "full_line"]
TEXT_UNITS = ("file", "paragraph", "line", "full_line")

KINDS = {".txt": "text", ".text": "text", ".md": "text", ".raw": "text", ".tokens": "text"}
KINDS |= {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet"}
DESCRIPTIONS = {"readme", "license", "licence", "notice", "citation", "dataset_info", "dataset_infos", "state"}
ACCEPTED = "txt, jsonl or parquet files (.txt and .jsonl also with .gz)"

SPLIT_SPELLINGS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
PARQUET_ROWS = 1024  # per read


def kind_of(path: Path) -> str | None:
    """``"text"``, ``"json"`` or ``"parquet"`` by the file's ending, None for others."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        inner = KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return inner if inner in ("text", "json") else None
    return KINDS.get(suffixes[-1]) if suffixes else None


def find_files(pattern: str, *, split: str | None = None) -> list[Path]:
    """Files named by a path, a glob pattern or a folder, sorted by path.

    Args:
        pattern: file, pattern (``**`` descends) or folder; of a folder, files in it and its sub-folders.
        split: of a folder whose files or sub-folders are named after splits (``train-0001.parquet``, ``test/a.txt``),
            take this one's.

    Raises:
        DataError: nothing there, an ending that we do not read, or several kinds at once.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if _is_data(file, path)]
        if not files:
            raise DataError(f"Folder {pattern} holds no {ACCEPTED}.")
        files = _files_of_split(path, files, split)
    elif path.is_file():
        files = [path]
    else:
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not files:
            raise DataError(
                f"No file matches {pattern!r} (from {Path.cwd()}); give an existing file, folder or pattern of "
                f"{ACCEPTED}."
            )
    kinds: dict[str, Path] = {}
    for file in files:
        kind = kind_of(file)
        if kind is None:
            raise DataError(f"{file} has an ending that is not read; rename or convert it to {ACCEPTED}.")
        kinds.setdefault(kind, file)
    if len(kinds) > 1:
        examples = ", ".join(str(file) for file in kinds.values())
        raise DataError(f"{pattern!r} mixes kinds of files ({examples}); give a pattern with one ending.")
    return files


def _is_data(file: Path, folder: Path) -> bool:
    """Whether a file found in a folder is text to read, not a hidden file or a description of the data."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.is_file() and file.stem.lower() not in DESCRIPTIONS and kind_of(file) is not None


def _files_of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    def split_of(file: Path) -> str | None:
        relative = file.relative_to(folder)
        for part in (*relative.parts[:-1], relative.name.split(".")[0]):
            for name, spellings in SPLIT_SPELLINGS.items():
                # train, train-00000-of-00002, wiki.train.raw, lambada_test
                words = part.lower().replace("-", "_").split("_")
                if words[0] in spellings or words[-1] in spellings:
                    return name
        middle = relative.name.lower().split(".")[1:-1]
        return next((name for name, spellings in SPLIT_SPELLINGS.items() if set(middle) & set(spellings)), None)

    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        by_split.setdefault(split_of(file), []).append(file)
    named = [name for name in by_split if name]
    if split is None or not named:
        return files
    if split not in by_split:
        raise DataError(
            f"Folder {folder} has files for {', '.join(sorted(named))} but none for the split {split!r}; "
            f"name the files to use, for example {folder}/{named[0]}*{by_split[named[0]][0].suffix}."
        )
    return by_split[split]


@dataclass(frozen=True)
class LocalFiles:
    """Documents of local files of one kind.

    Attributes:
        paths: in reading order.
        fields: names of the text column in jsonl and parquet, by preference.
        unit: what is one document in a text file: the whole file, a paragraph (text between blank lines), a line
            without surrounding blanks, or a line with its end (blank lines: empty documents).
    """

    paths: tuple[Path, ...]
    fields: tuple[str, ...] = ("text",)
    unit: TextUnit = "file"
    label: str = "files"

    def __post_init__(self) -> None:
        if self.unit not in TEXT_UNITS:
            raise ConfigError(f"text_unit={self.unit!r} must be one of {', '.join(TEXT_UNITS)}.")
        if all(path.stat().st_size == 0 for path in self.paths):
            raise DataError(f"{self.paths[0]} is empty (0 bytes); it needs at least one document.")

    @property
    def kind(self) -> str:
        return kind_of(self.paths[0])

    @property
    def num_documents(self) -> int | None:
        if self.kind == "text" and self.unit == "file":
            return len(self.paths)
        if self.kind == "parquet":
            return sum(_open_parquet(path).metadata.num_rows for path in self.paths)
        return None

    def fingerprint(self) -> str:
        form = self.unit if self.kind == "text" else ",".join(self.fields)
        return text_fingerprint("files", self.kind, form, *(file_fingerprint(path) for path in self.paths))

    def documents(self) -> Iterator[str]:
        for path in self.paths:
            if path.stat().st_size == 0:
                logger.warning("%s is empty (0 bytes) and is read as one empty document.", path)
                yield ""
            elif self.kind == "text":
                yield from _read_text(path, self.unit)
            elif self.kind == "json":
                yield from _read_json_lines(path, self.fields)
            else:
                yield from _read_parquet(path, self.fields)


def _open_lines(path: Path):
    """Binary lines of a plain or gzipped file."""
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _decode(data: bytes, path: Path, place: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} {place}. If it is a binary file, convert it to "
            f"{ACCEPTED}; if it is text in another encoding, run iconv -t UTF-8."
        ) from None
    if "\0" in text:
        raise DataError(f"{path} looks like a binary file: NUL byte {place}. Convert it to {ACCEPTED}.")
    return text


def _damaged(path: Path, error: BaseException) -> DataError:
    return DataError(f"{path} is truncated or damaged ({error}); copy or download it again.")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered (from 1) lines with their ends."""
    try:
        with _open_lines(path) as stream:
            for number, data in enumerate(stream, start=1):
                text = _decode(data, path, f"in line {number}")
                yield number, text.removeprefix("\ufeff") if number == 1 else text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from error


def _read_text(path: Path, unit: TextUnit) -> Iterator[str]:
    if unit == "file":
        try:
            with _open_lines(path) as stream:
                data = stream.read()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _damaged(path, error) from error
        yield _decode(data, path, "in it").removeprefix("\ufeff")
    elif unit == "paragraph":
        paragraph: list[str] = []
        for _, line in _lines(path):
            if line.strip():
                paragraph.append(line)
            elif paragraph:
                yield "".join(paragraph)
                paragraph = []
        if paragraph:
            yield "".join(paragraph)
    else:
        for _, line in _lines(path):
            stripped = line.strip()
            yield stripped if unit == "line" or not stripped else line


def _read_json_lines(path: Path, fields: Sequence[str]) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            hint = "the file seems to be cut off" if not line.endswith("\n") else "one JSON object per line is expected"
            raise DataError(f"{path}, line {number}: not valid JSON ({error.msg}); {hint}.") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: holds a {type(record).__name__}, not an object with a text field.")
        yield text_of(record, fields, f"{path}, line {number}")


def _open_parquet(path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} is not a complete parquet file ({str(error).splitlines()[0][:160]}); copy or download it again."
        ) from error


def _read_parquet(path: Path, fields: Sequence[str]) -> Iterator[str]:
    import pyarrow as pa

    file = _open_parquet(path)
    columns = file.schema_arrow.names
    field = next((name for name in fields if name in columns), None)
    if field is None:
        raise DataError(f"{path}: has no column {either(fields)}; its columns are {', '.join(columns)}. {FIELD_HINT}")
    row = 0
    try:
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[field]):
            for value in batch.column(0).to_pylist():
                if not isinstance(value, str):
                    raise DataError(f"{path}, row {row}: column {field!r} holds {type(value).__name__}, not text.")
                yield value
                row += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} is damaged after row {row} ({str(error).splitlines()[0][:160]}); copy or download it again."
        ) from error
