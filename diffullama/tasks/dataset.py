"""Rows of an evaluation's data set, through ``datasets``: the published one on the hub, or a copy in the same format.

A copy is a folder written by ``save_to_disk``, a folder of files, or one jsonl, json, csv, tsv, parquet or txt file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.data.hub import is_saved_dataset, load_hub_dataset, load_saved_dataset
from common.data.sources import first_line
from common.errors import DataError

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a task's data are published, and what its rows hold.

    Attributes:
        hub: data set on the hub, ``owner/name``.
        config: of that data set.
        split: that is evaluated.
        columns: our name of a field -> names it may have, by preference; all fields are required.
    """

    hub: str
    config: str | None = None
    split: str = "validation"
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)


def load_rows(
    task: str, source: Source, *, place: str | None = None, split: str | None = None, cache_dir: str | None = None
) -> list[dict[str, Any]]:
    """All rows, with the fields named as in ``source.columns`` and the others as they are.

    Args:
        task: for messages, which name the option ``data.<task>``.
        place: a local copy, or another data set of the same format on the hub (``owner/name`` or
            ``owner/name:config``); None: the published one.
        split: None: the task's.

    Raises: DataError if there is no such data set, it cannot be read, or a field is missing.
    """
    split = split or source.split
    dataset = _open(task, source, place, split, cache_dir)
    names = {}
    for wanted, spellings in source.columns.items():
        name = next((spelling for spelling in spellings if spelling in dataset.column_names), None)
        if name is None:
            raise DataError(
                f"data.{task}={place or source.hub} has no column {' or '.join(spellings)}, only "
                f"{', '.join(dataset.column_names)}; give rows in the format of {source.hub}."
            )
        names[wanted] = name
    rows = [{**row, **{wanted: row[name] for wanted, name in names.items()}} for row in dataset]
    if not rows:
        raise DataError(f"data.{task}={place or source.hub} has no rows in split {split!r}.")
    return rows


def _open(task: str, source: Source, place: str | None, split: str, cache_dir: str | None):
    if place is None:
        return _from_hub(task, source.hub, source.config, split, cache_dir)
    path = Path(place).expanduser()
    if path.is_dir():
        return _saved(path, split) if is_saved_dataset(path) else _from_folder(task, path, split, cache_dir)
    if path.is_file():
        return _from_file(task, path, cache_dir)
    if place.startswith((".", "/", "~")) or place.count("/") > 1 or path.suffix in BUILDERS:
        raise DataError(f"data.{task}={place} does not exist; give an existing file or folder, or a name on the hub.")
    repository, _, config = place.partition(":")
    return _from_hub(task, repository, config or None, split, cache_dir)


def _saved(path: Path, split: str):
    import datasets

    parts = [load_saved_dataset(path, part) for part in split.split("+")]
    is_dict = (path / "dataset_dict.json").is_file()
    return datasets.concatenate_datasets(parts) if is_dict else parts[0]


def _from_hub(task: str, repository: str, config: str | None, split: str, cache_dir: str | None):
    try:
        return load_hub_dataset(repository, config, split, cache_dir=_downloads(cache_dir))
    except DataError as error:
        reason = first_line(error.__cause__) if error.__cause__ else str(error)
        named = f"'{repository}'" + (f", '{config}'" if config else "")
        raise DataError(
            f"data.{task}: {repository}{f' ({config})' if config else ''}, split {split!r}, cannot be loaded from the "
            f"hub ({reason}). Without hub access, save it where there is "
            f"(datasets.load_dataset({named}).save_to_disk('folder')), copy the folder here and set "
            f"data.{task}=folder; a jsonl, csv or parquet file with the same columns works too."
        ) from None


def _from_file(task: str, path: Path, cache_dir: str | None):
    import datasets

    builder = BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise DataError(f"data.{task}={path} has an ending that is not read; use one of {', '.join(BUILDERS)}.")
    options = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    return _load(task, path, builder, data_files=str(path), split=datasets.Split.TRAIN, cache=cache_dir, **options)


def _from_folder(task: str, path: Path, split: str, cache_dir: str | None):
    return _load(task, path, str(path), split=split, cache=cache_dir)


def _load(task: str, path: Path, builder: str, *, cache: str | None, **options):
    import datasets

    try:
        return datasets.load_dataset(builder, cache_dir=_downloads(cache), **options)
    except Exception as error:  # arrow, json, csv and split errors alike: the file or folder is not what it should be
        cause = error.__cause__ or error
        raise DataError(
            f"data.{task}={path} cannot be read ({first_line(cause)}); give a complete file, or a folder with one file "
            "for each split."
        ) from None


def _downloads(cache_dir: str | None) -> str | None:
    return None if cache_dir is None else str(Path(cache_dir).expanduser() / "hub")
