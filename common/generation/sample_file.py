"""Sampled texts on disk: one JSON object per line, never silently overwritten, continued after an interruption.

While a run lasts, every process appends finished rows to a part file of its own beside the output
(``texts.jsonl.part0``); at the end the main process merges the parts, sorted by row number, into the output.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from common.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """One sampled text.

    Attributes:
        index: row number; with ``seed`` it determines the row's random numbers.
        tokens: ids.
        text: decoded tokens; None if the model has no tokenizer.
        method: as configured.
        steps: of the time grid; None for methods without one.
        free: positions that were filled (the others were given).
        calls: network evaluations of this row.
        launches: launches of its process up to the row's end, each over all rows in flight.
        seconds: from the row's admission to its end.
        seed: of the run.
        settings: digest of all options that decide the tokens, and of where the model came from.
        git_revision: of the sources.
    """

    index: int
    tokens: list[int]
    text: str | None
    method: str
    steps: int | None
    free: int
    calls: int
    launches: int
    seconds: float
    seed: int
    settings: str
    git_revision: str | None


class SampleFile:
    """The output of one process and, on the main one, of the run.

    Args:
        path: the output; None keeps records in memory only.
        rank: of this process.
        record: what a line holds, ``SampleRecord`` or a subclass with more fields.
    """

    def __init__(self, path: str | None, rank: int = 0, record: type[SampleRecord] = SampleRecord) -> None:
        self.path = None if path is None else Path(path)
        self.rank = rank
        self._record = record
        self._records: dict[int, SampleRecord] = {}

    def parts(self) -> list[Path]:
        """Part files of this or of an interrupted run, of any number of processes."""
        if self.path is None:
            return []
        return sorted(self.path.parent.glob(f"{glob_escape(self.path.name)}.part[0-9]*"))

    def prepare(self, settings: str, *, overwrite: bool, resume: bool) -> set[int]:
        """Row numbers that are already there; called by the main process before any other opens the file.

        Raises: ConfigError if something is there and neither ``overwrite`` nor ``resume`` is set, or if it was made
            with other options; DataError if it cannot be read or the folder cannot be written.
        """
        if self.path is None:
            return set()
        if self.path.is_dir():
            raise ConfigError(f"output={self.path} is a folder; give the name of a .jsonl file in it.")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"output={self.path}: cannot make its folder ({error.strerror}); choose another."
            ) from error
        found = [path for path in [self.path, *self.parts()] if path.exists()]
        if not found:
            return set()
        if overwrite:
            for part in self.parts():
                part.unlink()
            return set()  # the old output stays until the new one is complete
        if not resume:
            raise ConfigError(
                f"output={self.path} exists{'' if self.path.exists() else ' in part (' + found[0].name + ')'}; set "
                "resume=true to continue it, overwrite=true to replace it, or choose another name."
            )
        for path in found:
            for record in read_records(path, self._record):
                if record.settings != settings:
                    raise ConfigError(
                        f"resume=true, but {path} was made with other options (row {record.index}); repeat the command "
                        "that made it with resume=true added, or choose another output."
                    )
                self._records[record.index] = record
        return set(self._records)

    def append(self, record: SampleRecord) -> None:
        """Keeps one finished row; it is on disk when this returns."""
        self._records[record.index] = record
        if self.path is not None:
            with open(f"{self.path}.part{self.rank}", "a", encoding="utf-8") as part:
                part.write(json.dumps(asdict(record)) + "\n")

    def own(self) -> list[SampleRecord]:
        """Records of this process by row number."""
        return [self._records[index] for index in sorted(self._records)]

    def merge(self) -> list[SampleRecord]:
        """All records of all processes by row number, written to the output; called by the main process at the end."""
        for part in self.parts():
            self._records |= {record.index: record for record in read_records(part, self._record)}
        records = [self._records[index] for index in sorted(self._records)]
        if self.path is not None:
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(record)) + "\n" for record in records)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            for part in self.parts():
                part.unlink()
        return records


def glob_escape(name: str) -> str:
    """``name`` with the characters that glob patterns interpret taken literally."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def read_records(path: str | Path, record: type[SampleRecord] = SampleRecord) -> list[SampleRecord]:
    """Records of one file; a last line that an interruption cut short is left out.

    Raises: DataError for any other line that is not a record.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as sampled texts: {error}.") from error
    names = {field.name for field in fields(record)}
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            values = json.loads(line)
            if not isinstance(values, Mapping) or set(values) != names:
                raise ValueError("other fields than those of a sampled text")
            records.append(record(**values))
        except ValueError as error:
            if number == len(lines):  # every complete line ends in a newline
                continue
            raise DataError(
                f"{path}, line {number} is no sampled text ({error}); remove the line or choose another output."
            ) from error
    return records


def texts(records: Iterable[SampleRecord]) -> str:
    """Texts as the reference prints them: each followed by a line of 92 equals signs."""
    return "".join(f"{' '.join(map(str, r.tokens)) if r.text is None else r.text}\n{'=' * 92}\n" for r in records)
