"""A folder of generated networks: numbered files that are never overwritten unasked, and a record of each.

``generated_<tag>_001.pth``, or with a condition ``generated_<tag>_class0793_001.pth``; an adapter is a folder of that
name. ``networks.jsonl`` has a line per network: file, seed, permutation state, condition, hashes of the generator and
of the options, test result. ``generation.json`` describes the last invocation.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from common.checkpoint import write_json
from common.errors import CheckpointError, DataError
from rpg.checkpoint_files import write_checkpoint
from rpg.requests import Request

RECORDS, DESCRIPTION = "networks.jsonl", "generation.json"
SUFFIXES = {"pth": ".pth", "safetensors": ".safetensors", "peft": ""}


class GeneratedFolder:
    """Names, writes and lists generated networks.

    Args:
        folder: made when the first network is written.
        tag: what the files are called after: the generator's name.
        kind: ``pth``, ``safetensors`` or ``peft``.
        overwrite: replace files of the same names.
        adapter_config: of ``peft``.
    """

    def __init__(
        self,
        folder: Path | str,
        tag: str,
        kind: str,
        *,
        overwrite: bool = False,
        adapter_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.tag, self.kind, self.overwrite = Path(folder), tag, kind, overwrite
        self.adapter_config = adapter_config
        if self.folder.exists() and not self.folder.is_dir():
            raise DataError(f"output={self.folder} is a file; give a folder.")
        if kind == "peft" and adapter_config is None:
            raise CheckpointError(
                "format=peft needs a generator that was trained on adapter folders; use format=pth or "
                "format=safetensors."
            )

    def path(self, request: Request) -> Path:
        """Where a request's network goes; numbers start at 001."""
        return self.folder / f"{self._stem(request.label)}{request.index + 1:03d}{SUFFIXES[self.kind]}"

    def _stem(self, label: str) -> str:
        return f"generated_{self.tag}_{f'{label}_' if label else ''}"

    def next_indices(self, labels: Sequence[str]) -> dict[str, int]:
        """The first free index of each label, whatever the format of the files that are there."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        free = {}
        for label in labels:
            pattern = re.compile(rf"{re.escape(self._stem(label))}(\d{{3,}})(?:\.\w+)?")
            free[label] = max((int(found[1]) for name in names if (found := pattern.fullmatch(name))), default=0)
        return free

    def check(self, requests: Sequence[Request]) -> None:
        """Raises CheckpointError if a request's file is there and must not be replaced, or two share a name."""
        paths = [self.path(request) for request in requests]
        shared = [path for path, count in Counter(paths).items() if count > 1]
        if shared:
            raise CheckpointError(f"two requests would be written to {shared[0]}; give them different labels.")
        if self.overwrite:
            return
        there = [path for path in paths if path.exists()]
        if there:
            others = f" (and {len(there) - 1} more)" if len(there) > 1 else ""
            raise CheckpointError(
                f"{there[0]} exists{others} and will not be replaced: add append=true for further networks, "
                "overwrite=true to replace it, or choose another output."
            )

    def write(self, request: Request, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
        """Writes one network with its metadata."""
        return write_checkpoint(
            self.path(request),
            state,
            self.kind,
            metadata,
            overwrite=self.overwrite,
            adapter_config=self.adapter_config,
        )

    def record(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Adds lines to the list of networks; an older line of the same file goes."""
        new = {str(record["file"]): dict(record) for record in records}
        kept = [record for record in read_records(self.folder) if record["file"] not in new]
        lines = [json.dumps(record, ensure_ascii=False) for record in [*kept, *new.values()]]
        temporary = self.folder / f".{RECORDS}.tmp"
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / RECORDS)

    def describe(self, description: Mapping[str, Any]) -> None:
        """Writes what the invocation was."""
        write_json(self.folder / DESCRIPTION, dict(description))


def read_records(folder: Path | str) -> list[dict[str, Any]]:
    """The list of a folder's generated networks whose files are there; empty if there is none.

    Raises: DataError for a damaged line.
    """
    path = Path(folder) / RECORDS
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            if (path.parent / record["file"]).exists():
                records.append(record)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number} is damaged ({error}); delete the line.") from None
    return records
