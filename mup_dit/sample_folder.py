"""A folder of samples: the share of each process, what is there already, and the files that describe it.

Samples are cut into blocks of consecutive indices that processes take in turn. The composition of batches does not
depend on the number of processes, so that files are equal bit for bit for any number of them.

``samples.json`` holds options, seed, revision and cost; ``manifest.jsonl`` a line per image; ``grid.png`` the first
images.

Dimensions: B images; H, W rows and columns of pixels; C channels.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import DataError
from common.parallel import Parallel
from common.provenance import collect
from mup_dit.generation_config import GenerateConfig
from mup_dit.image_files import PARTS, Writer, build_writer, image_grid, remove_parts, replace_whole, to_image
from mup_dit.requests import Request

INDEX_FILE, MANIFEST = "samples.json", "manifest.jsonl"

MakeImages = Callable[[Sequence[Request]], Sequence[np.ndarray]]
"""Requests -> uint8 ``(H, W, C)`` of each."""


@dataclass(frozen=True)
class Generation:
    """What was sampled and what it cost, over all processes."""

    folder: Path
    images: int
    made: int  # of them in this invocation
    seconds: float  # of the slowest process
    evaluations: int  # of the network per image

    def summary(self) -> str:
        if not self.made:
            return f"{self.images} images in {self.folder}, none of them new"
        speed = self.made / max(self.seconds, 1e-9)
        return (
            f"{self.made} images in {self.seconds:.1f} s ({speed:.2f}/s), {self.evaluations} network evaluations each, "
            f"in {self.folder}"
        )


def write_images(
    config: GenerateConfig,
    make: MakeImages,
    requests: Sequence[Request],
    parallel: Parallel,
    *,
    details: Sequence[dict] = (),
) -> Generation:
    """Makes the images that are not there yet and writes files, manifest, grid and a description of the run.

    Raises: DataError if the folder holds another run's samples.
    """
    folder = Path(config.output)
    if parallel.is_main:
        prepare(folder, config)
        _write_manifest(folder, requests)
    parallel.barrier()
    writer = build_writer(config.format, folder, config.shard_size)
    size = config.shard_size if config.format == "webdataset" else config.batch_size
    blocks = [requests[first : first + size] for first in range(0, len(requests), size)]
    started = time.perf_counter()
    made = _write_blocks(config, make, writer, blocks[parallel.rank :: parallel.world_size], parallel)
    seconds = time.perf_counter() - started
    (total_made,) = parallel.sum([made])
    evaluations, slowest = parallel.max([getattr(make, "evaluations", 0), seconds])
    generation = Generation(folder, len(requests), int(total_made), slowest, int(evaluations))
    if parallel.is_main:
        _finish(config, writer, requests, details, generation)
    parallel.barrier()
    return generation


def _write_blocks(
    config: GenerateConfig,
    make: MakeImages,
    writer: Writer,
    blocks: Sequence[Sequence[Request]],
    parallel: Parallel,
) -> int:
    """Number of images made."""
    made = 0
    hidden = None if config.progress and parallel.is_main else True  # None: shown on a terminal only
    with tqdm(total=sum(map(len, blocks)), unit="image", disable=hidden, leave=False) as bar:
        for block in blocks:
            records = [request.record() for request in block]
            if not (config.resume and writer.has(records)):
                batches = [
                    block[first : first + config.batch_size] for first in range(0, len(block), config.batch_size)
                ]
                images = [image for batch in batches for image in make(batch)]
                if block[0].index < config.grid:
                    _keep_for_grid(Path(config.output), block[0].index, images[: config.grid - block[0].index])
                writer.write(images, records)
                made += len(block)
            bar.update(len(block))
    return made


def prepare(folder: Path, config: GenerateConfig) -> None:
    """Makes an empty folder for this run, or opens the one that it continues; the main process's business.

    Raises: DataError if the folder holds something else.
    """
    index = folder / INDEX_FILE
    if folder.exists() and any(folder.iterdir()):
        if not index.exists():
            raise DataError(f"output={folder} holds files that are no samples; choose another folder.")
        before = json.loads(index.read_text())
        if config.resume and before.get("settings") != config.settings():
            raise DataError(
                f"output={folder} holds samples of other options (or of another batch_size); use the same options, "
                "another folder, or overwrite=true."
            )
        if not (config.resume or config.overwrite):
            raise DataError(
                f"output={folder} holds {before.get('images', 'unfinished')} samples; use overwrite=true to replace "
                "them, resume=true to complete them, or another folder."
            )
        if config.overwrite:
            _clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not index.exists():
        _write_json(index, {"settings": config.settings(), "complete": False})


def _write_manifest(folder: Path, requests: Sequence[Request]) -> None:
    """At the beginning, so that what an interrupted run wrote can be told from other files."""
    lines = (json.dumps(request.record(), ensure_ascii=False) for request in requests)
    replace_whole(folder / MANIFEST, lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8"))


def _clear(folder: Path) -> None:
    """Removes what an earlier run's manifest and formats name, and nothing else."""
    manifest = folder / MANIFEST
    files = [json.loads(line)["file"] for line in manifest.read_text().splitlines()] if manifest.exists() else []
    names = [
        *files,
        *(path.name for path in folder.glob("shard-*.tar")),
        "samples.npz",
        "grid.png",
        MANIFEST,
        INDEX_FILE,
    ]
    for name in names:
        path = (folder / name).resolve()
        if folder.resolve() in path.parents:
            path.unlink(missing_ok=True)
    remove_parts(folder)


def _keep_for_grid(folder: Path, first: int, images: Sequence[np.ndarray]) -> None:
    def save(path: Path) -> None:
        with path.open("wb") as stream:
            np.savez(stream, *images)

    replace_whole(folder / PARTS / f"grid-{first:08d}.npz", save)


def _read_for_grid(folder: Path) -> list[np.ndarray]:
    """The first images that are as large as the very first."""
    tiles = []
    for part in sorted((folder / PARTS).glob("grid-*.npz")):
        with np.load(part) as archive:
            tiles += [archive[name] for name in archive.files]
    return [tile for tile in tiles if tile.shape == tiles[0].shape]


def _finish(
    config: GenerateConfig, writer: Writer, requests: Sequence[Request], details: Sequence[dict], generation: Generation
) -> None:
    folder = generation.folder
    writer.finish(len(requests))
    if config.layout == "geneval":
        for number in range(-(-len(requests) // config.samples_per_prompt)):
            _write_json(folder / f"{number:05d}" / "metadata.jsonl", details[number], indent=None)
    if tiles := _read_for_grid(folder):
        grid = to_image(image_grid(np.stack(tiles)))
        replace_whole(folder / "grid.png", lambda path: grid.save(path, format="PNG"))
    remove_parts(folder)
    before = json.loads((folder / INDEX_FILE).read_text())
    description = {
        "settings": config.settings(),
        "complete": True,
        "images": generation.images,
        "seconds": round(generation.seconds + before.get("seconds", 0.0), 3),
        "network_evaluations_per_image": generation.evaluations or before.get("network_evaluations_per_image", 0),
        **collect(seed=config.seed),
        "options": asdict(config),
    }
    _write_json(folder / INDEX_FILE, description)


def _write_json(path: Path, value: object, indent: int | None = 1) -> None:
    text = json.dumps(value, indent=indent, default=str, ensure_ascii=False) + "\n"
    replace_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
