"""The same images from every kind of place, in order, shared out over processes."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from mup_dit.image_files import to_image
from mup_dit.metrics.image_sets import open_images

COUNT = 7


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (COUNT, 6, 5, 3), dtype=np.uint8)


def as_npz(folder, pixels):
    np.savez(folder / "images.npz", arr_0=pixels)
    return folder / "images.npz"


def as_compressed_npz(folder, pixels):
    np.savez_compressed(folder / "images.npz", arr_0=pixels, arr_1=np.arange(COUNT))
    return folder / "images.npz"


def as_samples(folder, pixels):
    np.savez(folder / "samples.npz", arr_0=pixels)
    to_image(pixels[0]).save(folder / "grid.png")
    return folder


def as_folder(folder, pixels):
    for index, image in enumerate(pixels):
        to_image(image).save(folder / f"{index:03d}.png")
    to_image(pixels[0]).save(folder / "grid.png")
    return folder


def as_listed_folder(folder, pixels):
    names = [f"{COUNT - index}.png" for index in range(COUNT)]  # not in the order of names
    for image, name in zip(pixels, names, strict=True):
        to_image(image).save(folder / name)
    lines = [json.dumps({"index": index, "file": name}) for index, name in enumerate(names)]
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder


def as_shards(folder, pixels):
    for shard, part in enumerate((pixels[:4], pixels[4:])):
        with tarfile.open(folder / f"shard-{shard:06d}.tar", "w") as archive:
            for index, image in enumerate(part):
                buffer = io.BytesIO()
                to_image(image).save(buffer, format="PNG")
                for name, content in ((f"{index}.json", b"{}"), (f"{index}.png", buffer.getvalue())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return folder


@pytest.mark.parametrize(
    "place", [as_npz, as_compressed_npz, as_samples, as_folder, as_listed_folder, as_shards], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_place_gives_every_image_once_and_in_order(tmp_path, pixels, place, world_size):
    images = open_images(str(place(tmp_path, pixels)))
    assert len(images) == COUNT
    found = {}
    for rank in range(world_size):
        for batch in images.batches(2, rank, world_size):
            assert batch.indices[0] // 2 % world_size == rank
            found |= dict(zip(batch.indices, batch.images, strict=True))
    assert sorted(found) == list(range(COUNT))
    assert all(np.array_equal(found[index], pixels[index]) for index in found)


def test_data_sets_go_by_name():
    images = open_images("digits", split="validation")
    batch = next(iter(images.batches(4)))
    assert len(images) == 261 and batch.images[0].shape == (8, 8, 1)


def test_a_broken_file_stops_or_is_left_out_by_name(tmp_path, pixels):
    folder = as_folder(tmp_path, pixels)
    (folder / "003.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"003\.png"):
        list(open_images(str(folder)).batches(4))
    images = open_images(str(folder), on_error="skip")
    assert [index for batch in images.batches(4) for index in batch.indices] == [0, 1, 2, 4, 5, 6]
    assert images.skipped == ["003.png"]


def test_places_without_images_are_named(tmp_path, pixels):
    with pytest.raises(DataError, match="reference=nowhere"):
        open_images("nowhere", option="reference")
    with pytest.raises(DataError, match="holds no images"):
        open_images(str(tmp_path))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2))
    with pytest.raises(DataError, match="arr_0"):
        open_images(str(tmp_path / "statistics.npz"))
    np.savez(tmp_path / "floats.npz", arr_0=pixels.astype(np.float32))
    with pytest.raises(DataError, match="float32"):
        open_images(str(tmp_path / "floats.npz"))


def test_an_archive_that_was_cut_off_is_named(tmp_path, pixels):
    path = as_npz(tmp_path, pixels)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"images\.npz"):
        open_images(str(path))


def test_grey_files_stay_grey(tmp_path):
    Image.fromarray(np.zeros((3, 4), np.uint8)).save(tmp_path / "0.png")
    assert next(iter(open_images(str(tmp_path)).batches(1))).images[0].shape == (3, 4, 1)
