"""Manifest, structure and tokens of a checkpoint folder, made once under a lock and read ever after.

Layout below ``cache_dir`` (by default ``<folder>.rpg``), one sub-folder per choice of files (``all`` for all of them)::

    all/manifest.json                  files, order, digests
    all/layer/, all/residual/          the structure: JSON and safetensors
    all/tokens-layer-d8192-g1/         the tokens as one memory map, with the codec

Whoever finds that the checkpoints have changed says which, and makes everything again.
"""

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from common.errors import CheckpointError, DataError
from common.folders import write_folder
from rpg.adapters import CONFIG_FILE, is_adapter_folder, read_adapter_config
from rpg.checkpoint_files import find_checkpoints, names_of, read_checkpoint
from rpg.codec import TokenCodec
from rpg.manifest import MANIFEST_FILE, Manifest, compute_manifest
from rpg.store import TokenStore, open_store, write_store
from rpg.structure import Structure, compute_structure
from rpg.structure_cache import read_structure_cache

SOURCE_FILE = "source.json"
REFERENCE_CACHE = "structure.cache"
ADAPTER_SHAPE = ("r", "lora_alpha", "target_modules", "peft_type", "use_dora", "bias", "rank_pattern", "alpha_pattern")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """Which checkpoints of a folder are meant, and where their cache lies."""

    folder: Path | None
    cache_dir: Path
    pattern: str | None = None
    limit: int | None = None

    @property
    def cache(self) -> Path:
        """The part of the cache for these files."""
        if self.pattern is None and self.limit is None:
            return self.cache_dir / "all"
        text = json.dumps([self.pattern, self.limit])
        return self.cache_dir / f"part-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def paths(self) -> list[Path]:
        """The checkpoints in their order; empty if there is no folder.

        Raises: DataError if the pattern fits none of several files.
        """
        if self.folder is None or not self.folder.exists():
            return []
        # a cache below the folder holds files with a checkpoint's suffix
        cache = self.cache_dir.resolve()
        everything = [path for path in find_checkpoints(self.folder) if cache not in path.resolve().parents]
        found = everything
        if self.pattern is not None:
            matching = set(find_checkpoints(self.folder, self.pattern))
            found = [path for path in everything if path in matching]
        if everything and not found:
            raise DataError(
                f"data.pattern={self.pattern} fits none of the {len(everything)} checkpoints in {self.folder}, for "
                f"example {everything[0].name}; it is a glob of the relative path."
            )
        return found[: self.limit] if self.limit else found


@dataclass(frozen=True)
class CachedTokens:
    """What ``load_or_build`` gives; ``store`` is None in generation-only mode."""

    codec: TokenCodec
    store: TokenStore | None
    manifest: Manifest


def load_or_build(
    selection: Selection,
    *,
    dim_per_token: int,
    granularity: int = 1,
    normalisation: str = "layer",
    fill_value: float = float("nan"),
) -> CachedTokens:
    """Tokens of the selected checkpoints, from the cache where it is still true.

    Without checkpoints, the codec is made from a structure in the cache (or from the reference's ``structure.cache``
    beside the folder): enough for generating.

    Raises:
        DataError: no checkpoints and no structure; checkpoints that do not belong together or are not finite.
        CheckpointError: a file that cannot be read; a cache folder that cannot be written.
    """
    cache, paths = selection.cache, selection.paths()
    if not paths:
        return _without_checkpoints(selection, dim_per_token, granularity, normalisation, fill_value)
    with _locked(selection):
        manifest = _current_manifest(selection, paths)
        structure = _structure(cache / normalisation, manifest, paths, normalisation)
        codec = TokenCodec(structure, dim_per_token, granularity, fill_value)
        return CachedTokens(codec, _store(cache / _store_name(codec), manifest, paths, codec), manifest)


@contextlib.contextmanager
def _locked(selection: Selection) -> Iterator[None]:
    """One process builds, the others wait."""
    path = selection.cache_dir / f".{selection.cache.name}.lock"
    try:
        selection.cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(path))
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            logger.info("Waiting for another process that reads the same checkpoints (%s).", path)
            lock.acquire()
    except OSError as error:
        raise DataError(
            f"data.cache_dir={selection.cache_dir} cannot be written ({error.strerror}); set it to a folder with room "
            "for the tokens."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _current_manifest(selection: Selection, paths: list[Path]) -> Manifest:
    """The manifest as the files are now; writes it, and says what has changed since the last one."""
    known = None
    if (selection.cache / MANIFEST_FILE).exists():
        try:
            known = Manifest.load(selection.cache)
        except DataError as error:
            logger.warning("%s", error)
    config = shared_adapter_config(paths)
    manifest = compute_manifest(paths, names_of(paths, selection.folder), known, config)
    if known is not None and known.digest != manifest.digest:
        changes = manifest.changes_since(known)
        logger.warning("The checkpoints in %s are not those of the cache (%s); it is made again.",
                       selection.folder, changes)  # fmt: skip
        for stale in selection.cache.iterdir():
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
    if known != manifest:
        manifest.save(selection.cache)
    return manifest


def shared_adapter_config(paths: list[Path]) -> Mapping[str, object] | None:
    """The configuration of PEFT adapters; None for plain state dicts.

    Raises: DataError if adapters and files are mixed, or adapters of different shapes.
    """
    adapters = [path for path in paths if is_adapter_folder(path)]
    if not adapters:
        return None
    if len(adapters) < len(paths):
        other = next(path for path in paths if path not in adapters)
        raise DataError(
            f"{adapters[0]} is an adapter and {other} is not; choose one kind with data.pattern, for example "
            f"data.pattern='{adapters[0].name[:4]}*'."
        )
    first = read_adapter_config(adapters[0])
    for path in adapters[1:]:
        config = read_adapter_config(path)
        for option in ADAPTER_SHAPE:
            one, two = first.get(option), config.get(option)
            if isinstance(one, list) and isinstance(two, list):
                one, two = sorted(one), sorted(two)
            if one != two:
                raise DataError(
                    f"{path / CONFIG_FILE} has {option}={two!r}, but {adapters[0] / CONFIG_FILE} has {one!r}; all "
                    "adapters must be of one kind."
                )
    return first


def read_all(paths: list[Path], purpose: str) -> Iterator[dict[str, Tensor]]:
    """The state dicts one after the other, with a progress bar on terminals."""
    for path in tqdm(paths, desc=purpose, unit="file", disable=None, leave=False):
        yield read_checkpoint(path)


def _structure(folder: Path, manifest: Manifest, paths: list[Path], normalisation: str) -> Structure:
    """The structure in ``folder`` if it was made from these checkpoints, else made now."""
    source = _source(folder)
    if source == manifest.digest:
        try:
            return Structure.from_folder(folder)
        except DataError as error:
            logger.warning("%s", error)
    structure = compute_structure(read_all(paths, "checking checkpoints"), normalisation, names=map(str, paths))

    def write(to: Path) -> None:
        structure.to_folder(to)
        (to / SOURCE_FILE).write_text(json.dumps({"manifest": manifest.digest}))

    _write_cache(folder, write)
    return structure


def _write_cache(folder: Path, write: Callable[[Path], object]) -> None:
    """Raises: DataError if the disk is full or the place cannot be written."""
    try:
        write_folder(folder, write)
    except CheckpointError as error:
        if not str(error).startswith("output="):
            raise  # one of the checkpoints that are read meanwhile
        raise DataError(str(error).replace("output=", "data.cache_dir: ")) from None


def _source(folder: Path) -> str | None:
    """Digest of the manifest that the structure in ``folder`` was made from; None if there is none."""
    try:
        return json.loads((folder / SOURCE_FILE).read_text())["manifest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store_name(codec: TokenCodec) -> str:
    fill = "" if codec.fill_value != codec.fill_value else f"-fill{codec.fill_value:g}"
    return f"tokens-{codec.structure.normalisation}-d{codec.dim}-g{codec.granularity}{fill}"


def _store(folder: Path, manifest: Manifest, paths: list[Path], codec: TokenCodec) -> TokenStore:
    if folder.exists():
        try:
            return open_store(folder, manifest.digest)
        except DataError as error:
            logger.warning("%s It is made again.", error)
    needed = 4 * len(paths) * codec.num_tokens * codec.dim
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise DataError(
            f"data.cache_dir={folder.parent.parent} has {free / 1e9:.1f} GB left, the tokens need {needed / 1e9:.1f} "
            "GB; free disk space, set data.cache_dir to another disk, or use fewer checkpoints (data.limit)."
        )

    def write(to: Path) -> None:
        write_store(to, read_all(paths, "writing tokens"), codec, manifest.digest)

    _write_cache(folder, write)
    return open_store(folder, manifest.digest)


def _without_checkpoints(
    selection: Selection, dim_per_token: int, granularity: int, normalisation: str, fill_value: float
) -> CachedTokens:
    cache = selection.cache
    if (cache / MANIFEST_FILE).exists() and _source(cache / normalisation) is not None:
        structure, manifest = Structure.from_folder(cache / normalisation), Manifest.load(cache)
        logger.warning(
            "There is no checkpoint in %s; the structure of %d in %s is used, which is enough for generating.",
            selection.folder, len(manifest.files), cache,
        )  # fmt: skip
        return CachedTokens(TokenCodec(structure, dim_per_token, granularity, fill_value), None, manifest)
    released = selection.folder.parent / REFERENCE_CACHE if selection.folder is not None else None
    if released is not None and released.is_file() and normalisation == "layer":
        found = read_structure_cache(released)
        manifest = Manifest(tuple(), 0, None)
        logger.warning("There is no checkpoint in %s; %s is used, which is enough for generating.",
                       selection.folder, released)  # fmt: skip
        return CachedTokens(TokenCodec(found.structure, dim_per_token, granularity, fill_value), None, manifest)
    if selection.folder is None:
        raise DataError("data.checkpoints is not set; give the folder that holds the checkpoints.")
    what = "does not exist" if not selection.folder.exists() else "holds no checkpoint (.pth, .safetensors, adapters)"
    raise DataError(
        f"data.checkpoints={selection.folder} {what}, and {cache} holds no manifest with a {normalisation} structure "
        f"to generate with; give a folder with checkpoints.{_codec_hint(cache)}"
    )


def _codec_hint(cache: Path) -> str:
    others = sorted(path.parent.name for path in cache.glob(f"*/{SOURCE_FILE}"))
    return f" Structures there: data.normalisation={' or '.join(others)}." if others else ""
