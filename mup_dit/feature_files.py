"""Features in one file per image, as PixArt-alpha keeps those of SA-1B: for its own code, and for ``sa1b:`` data here.

``caption_feature_wmask/<stem>.npz`` holds ``caption_feature`` (1, T, Y) and ``attention_mask`` (1, T);
``vae_features_<size>/<stem>.npy`` the posterior's mean and standard deviation, (2 C, S, S). All float32. Files that are
there are left as they are.

Dimensions: C channels, S side, T tokens, Y their channels.
"""

import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import DataError
from common.parallel import Parallel
from mup_dit.extraction import Extractor
from mup_dit.file_dataset import FileDataset
from mup_dit.image_sources import FEATURE_FOLDER, latent_folder


def write_feature_files(
    extractor: Extractor, dataset: FileDataset, folder: Path, parallel: Parallel, *, limit: tuple[int, int | None]
) -> dict[str, int]:
    """Features of every image, skipping files that exist; images are dealt out to processes in turn.

    Args:
        limit: first and last (exclusive) image, to share the work between machines.

    Returns: ``made`` and ``kept`` images, and those ``skipped`` as unreadable (with ``on_error=skip``).

    Raises: DataError if two images share a stem, or a file cannot be written.
    """
    stems = [Path(dataset.source.where(row)).stem for row in range(len(dataset.source))]
    if len(set(stems)) < len(stems):
        raise DataError(f"{dataset.source.name} has images of equal names, which one folder cannot hold; use shards.")
    rows = np.arange(len(stems))[limit[0] : limit[1]]
    todo = [row for row in rows[parallel.rank :: parallel.world_size] if _missing(extractor, folder, stems[row])]
    skipped = 0
    batches = [
        np.array(todo[first : first + extractor.batch_size]) for first in range(0, len(todo), extractor.batch_size)
    ]
    for arrays, left_out in tqdm(
        extractor.encoded(batches), total=len(batches), disable=None if parallel.is_main else True, leave=False
    ):
        skipped += len(left_out)
        for place, row in enumerate(arrays["row"]):
            _write(extractor, folder, stems[row], place, arrays)
    made, skipped = (int(count) for count in parallel.sum([len(todo) - skipped, skipped]))
    return {"made": made, "kept": len(rows) - made - skipped, "skipped": skipped}


def _paths(extractor: Extractor, folder: Path, stem: str) -> dict[str, Path]:
    paths = {}
    if extractor.text is not None:
        paths["caption"] = folder / FEATURE_FOLDER / f"{stem}.npz"
    if extractor.vae is not None:
        paths["latent"] = folder / latent_folder(extractor.size) / f"{stem}.npy"
    return paths


def _missing(extractor: Extractor, folder: Path, stem: str) -> bool:
    return not all(path.exists() for path in _paths(extractor, folder, stem).values())


def _write(extractor: Extractor, folder: Path, stem: str, place: int, arrays: dict[str, np.ndarray]) -> None:
    for kind, path in _paths(extractor, folder, stem).items():
        if path.exists():
            continue
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as stream:
                if kind == "latent":
                    np.save(stream, np.concatenate([arrays["mean"][place], arrays["std"][place]]))
                else:
                    first, last = arrays["first_token"][place : place + 2]
                    length = extractor.text.length
                    caption = np.zeros((1, length, arrays["tokens"].shape[1]), np.float32)
                    caption[0, : last - first] = arrays["tokens"][first:last]
                    mask = (np.arange(length) < last - first).astype(np.int64)[None]
                    np.savez(stream, caption_feature=caption, attention_mask=mask)
            os.replace(temporary, path)
        except OSError as error:
            raise DataError(
                f"{path} could not be written ({error}); free disk space and run the same command."
            ) from None
        finally:
            temporary.unlink(missing_ok=True)
