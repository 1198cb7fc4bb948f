"""Images on disk: exact pixels, whole files, bad files named."""

import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import ConfigError, DataError
from mup_dit.image_files import build_writer, image_grid, pack_folder, read_image, to_uint8
from mup_dit.pack import PackConfig
from mup_dit.pack import main as pack


def pictures(count: int, channels: int = 3, side: int = 4) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def records(first: int, count: int) -> list[dict]:
    return [{"index": index, "file": f"{index:06d}.png", "label": 1} for index in range(first, first + count)]


def png_folder(folder, images):
    build_writer("png", folder, 1).write(images, records(0, len(images)))
    return folder


def test_rounding_rules():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.9999, 1.0, 3.0]).reshape(1, 1, 1, 6)
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]
    assert to_uint8(x, "nearest")[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]
    values = torch.linspace(-1, 1, 1001).reshape(1, 1, 1, -1)
    assert int((to_uint8(values).int() - to_uint8(values, "nearest").int()).abs().max()) <= 1
    with pytest.raises(ConfigError, match="rounding"):
        to_uint8(x, "up")


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_blocks_arrive_in_any_order(tmp_path, channels):
    images = pictures(10, channels)
    writer = build_writer("npz", tmp_path, 1)
    for first in (6, 0, 3, 9):
        assert not writer.has(records(first, 3))
        writer.write(images[first : first + 3], records(first, min(3, 10 - first)))
    assert writer.has(records(3, 3))
    writer.finish(10)
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive.files == ["arr_0"]
        assert np.array_equal(archive["arr_0"], images)
    assert writer.has(records(3, 3))


def test_a_missing_block_is_noticed(tmp_path):
    writer = build_writer("npz", tmp_path, 1)
    writer.write(pictures(3), records(0, 3))
    with pytest.raises(DataError, match="3 images, expected 6"):
        writer.finish(6)
    assert not (tmp_path / "samples.npz").exists()


def test_shards_hold_images_and_records_and_are_reproducible(tmp_path):
    images = pictures(5)
    for name in ("a", "b"):
        build_writer("webdataset", tmp_path / name, 5).write(images, records(5, 5))
    shard = tmp_path / "a" / "shard-000001.tar"
    assert shard.read_bytes() == (tmp_path / "b" / "shard-000001.tar").read_bytes()
    with tarfile.open(shard) as archive:
        assert archive.getnames()[:2] == ["000005.png", "000005.json"]
        assert json.load(archive.extractfile("000007.json"))["index"] == 7
        assert np.array_equal(np.asarray(Image.open(archive.extractfile("000007.png"))), images[2])


@pytest.mark.parametrize("channels", [1, 3])
def test_packing_a_folder_keeps_every_pixel(tmp_path, channels, capsys):
    images = pictures(6, channels)
    folder = png_folder(tmp_path / "png", images)
    pack(PackConfig(folder=str(folder), count=4))
    with np.load(tmp_path / "png.npz") as archive:
        packed = archive["arr_0"]
    assert packed.dtype == np.uint8
    assert np.array_equal(packed, images[:4])
    assert "2 further images" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="overwrite=true"):
        pack(PackConfig(folder=str(folder), count=4))


def test_packing_names_what_is_missing_or_broken(tmp_path):
    folder = png_folder(tmp_path / "png", pictures(4))
    with pytest.raises(DataError, match=r"000004\.png is missing \(2 of 6"):
        pack_folder(folder, tmp_path / "out.npz", 6)
    (folder / "000002.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"000002\.png"):
        pack_folder(folder, tmp_path / "out.npz", 4)
    Image.new("RGB", (9, 9)).save(folder / "000002.png")
    with pytest.raises(DataError, match="images 2 to 2"):
        pack_folder(folder, tmp_path / "out.npz", 4)
    assert not (tmp_path / "out.npz").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["png"]
    with pytest.raises(DataError, match="no folder"):
        pack_folder(tmp_path / "nowhere", tmp_path / "out.npz", 4)


def test_grid_shows_every_image():
    images = pictures(5)
    grid = image_grid(images)
    assert grid.shape == (2 * 6 - 2, 3 * 6 - 2, 3)
    assert np.array_equal(grid[6:10, 6:10], images[4])


def test_images_are_read_as_grey_or_colour(tmp_path):
    Image.new("LA", (3, 2)).save(tmp_path / "a.png")
    Image.new("L", (3, 2)).save(tmp_path / "g.png")
    assert read_image(tmp_path / "a.png").shape == (2, 3, 3)
    assert read_image(tmp_path / "g.png").shape == (2, 3, 1)
    with pytest.raises(DataError, match="does not exist"):
        read_image(tmp_path / "none.png")
