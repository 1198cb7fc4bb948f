"""Documents of Hugging Face datasets: from the hub, from folders written by ``save_to_disk``, and as streams."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.data.fingerprint import text_fingerprint
from common.data.local_files import LocalFiles
from common.data.sources import FIELD_HINT, either, first_line
from common.errors import DataError

ROWS_PER_READ = 1024

logger = logging.getLogger(__name__)


class HubDataset:
    """Documents of a ``datasets.Dataset``."""

    def __init__(self, dataset, *, fields: Sequence[str] = ("text",), label: str = "dataset") -> None:
        self.dataset, self.label, self.num_documents = dataset, label, len(dataset)
        columns = dataset.column_names
        field = next((name for name in fields if name in columns), None)
        if field is None:
            raise DataError(
                f"{label}: has no column {either(fields)}; its columns are {', '.join(columns)}. {FIELD_HINT}"
            )
        self.field = field

    def documents(self) -> Iterator[str]:
        row = 0
        for batch in self.dataset.select_columns([self.field]).iter(batch_size=ROWS_PER_READ):
            for value in batch[self.field]:
                if not isinstance(value, str):
                    raise DataError(f"{self.label}, row {row}: {self.field!r} holds {type(value).__name__}, not text.")
                yield value
                row += 1

    def fingerprint(self) -> str:
        return text_fingerprint("dataset", self.dataset._fingerprint, self.field, len(self.dataset))


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``folder`` was written by ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def load_saved_dataset(folder: Path, split: str):
    """The ``datasets.Dataset`` of one split of a folder written by ``save_to_disk``.

    Raises:
        DataError: damaged folder, or no such split in it.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # arrow, json and file errors alike mean an incomplete folder
        raise DataError(
            f"{folder} is an incomplete dataset folder ({first_line(error)}); save or copy it again."
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        raise DataError(f"{folder} has the splits {', '.join(loaded)} but not {split!r}; set split to one of them.")
    return loaded[split]


def load_hub_dataset(
    repository: str, config: str | None, split: str, *, cache_dir: str | None, streaming: bool = False
):
    """One split of a dataset on the hub, downloaded into ``cache_dir`` or streamed.

    Repositories that still hold a loading script are read from the hub's own parquet conversion, with a warning.

    Raises:
        DataError: offline, unknown name, configuration or split; says how to use local files.
    """
    import datasets

    where = f"{repository}" + (f" ({config})" if config else "")
    options = {"split": split, "streaming": streaming, "cache_dir": cache_dir}
    try:
        try:
            return datasets.load_dataset(repository, config, **options)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            logger.warning(
                "%s holds a loading script; reading the hub's parquet conversion, which may hold only the first part "
                "of a very large dataset.",
                where,
            )
            return datasets.load_dataset(repository, config, revision="refs/convert/parquet", **options)
    except Exception as error:  # connection, gating, unknown names: many types, one remedy
        raise DataError(
            f"Dataset {where}, split {split!r}, cannot be loaded from the hub ({first_line(error)}). Without hub "
            "access (HF_HUB_OFFLINE=1 skips the retries) give local files instead: name=path/*.txt, "
            "name=path/*.jsonl, name=path/*.parquet or a folder (on a command line quote it: "
            "\"data.valid='ptb=/corpora/ptb/*.txt'\")."
        ) from error


def stream_of_files(files: LocalFiles):
    """Local files as a ``datasets.IterableDataset``, whose position can be saved (whole files, paragraphs, lines)."""
    import datasets

    names = [str(path) for path in files.paths]
    if files.kind == "text":
        by = {"file": "document", "paragraph": "paragraph", "line": "line", "full_line": "line"}[files.unit]
        options = {"sample_by": by, "keep_linebreaks": files.unit == "full_line"} if by == "line" else {"sample_by": by}
        return datasets.load_dataset("text", data_files=names, split="train", streaming=True, **options)
    return datasets.load_dataset(files.kind, data_files=names, split="train", streaming=True)
