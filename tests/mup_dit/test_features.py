"""Shards of features: written whole, mapped to read, damage noticed."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.errors import DataError
from mup_dit.features import claim_folder, map_shard, write_shard


def test_a_mapped_shard_holds_what_was_written_and_is_safetensors(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "row": np.arange(3),
        "mean": rng.standard_normal((3, 2, 4, 4)).astype(np.float16),
        "tokens": np.zeros((0, 6), np.float32),
    }
    write_shard(tmp_path / "shards" / "a.safetensors", arrays, {"skipped": ["x.jpg"]})
    found, note = map_shard(tmp_path / "shards" / "a.safetensors")
    library = load_file(tmp_path / "shards" / "a.safetensors")
    for name, value in arrays.items():
        assert np.array_equal(found[name], value) and np.array_equal(library[name], value)
        assert found[name].dtype == value.dtype and not found[name].flags.writeable
    assert note == {"skipped": ["x.jpg"]} and [path.name for path in (tmp_path / "shards").iterdir()] == [
        "a.safetensors"
    ]


def test_damaged_shards_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(DataError, match="missing"):
        map_shard(path)
    write_shard(path, {"row": np.arange(30)}, {})
    content = path.read_bytes()
    for damaged in (content[:-8], content + b"12345678", content[:4], b"", b"\xff" * 200):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="no complete shard"):
            map_shard(path)


def test_a_folder_belongs_to_one_recipe(tmp_path):
    folder = tmp_path / "features"
    claim_folder(folder, {"key": "a", "size": 8, "vae": "ema"})
    claim_folder(folder, {"key": "a", "size": 8, "vae": "ema"})
    with pytest.raises(DataError, match=r"something else \(size differ"):
        claim_folder(folder, {"key": "b", "size": 16, "vae": "ema"})
    with pytest.raises(DataError, match=r"the images differ"):
        claim_folder(folder, {"key": "c", "size": 8, "vae": "ema"})
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").touch()
    with pytest.raises(DataError, match="other files"):
        claim_folder(tmp_path / "letters", {"key": "a"})
