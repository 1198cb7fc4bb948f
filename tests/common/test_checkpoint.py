"""Checkpoint folders: complete or absent, verified, pruned; weights in one file."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from common import checkpoint
from common.checkpoint import (
    export_weights,
    find_checkpoint,
    list_checkpoints,
    load_weights,
    prune,
    read_manifest,
    read_weights,
    remove_leftovers,
    save_weights,
    step_of,
    write_checkpoint,
)
from common.config import CheckpointConfig
from common.errors import CheckpointError
from common.parallel import Parallel

ALONE = Parallel(0, 1, 0, torch.device("cpu"))


def write(run_dir: Path, step: int, **files: bytes) -> Path:
    def stage(folder: Path) -> None:
        save_weights(folder / "model.safetensors", {"w": torch.full((2,), float(step))})
        for name, content in files.items():
            (folder / name).write_bytes(content)

    return write_checkpoint(run_dir, step, [stage], config={"lr": 0.1}, parallel=ALONE)


def test_newest_checkpoint_wins_and_its_manifest_says_what_it_holds(tmp_path: Path):
    write(tmp_path, 9)
    newest = write(tmp_path, 10, note=b"hello")
    assert find_checkpoint(tmp_path) == newest
    manifest = read_manifest(newest)
    assert manifest["step"] == 10
    assert manifest["config"] == {"lr": 0.1}
    assert manifest["files"]["note"] == {
        "size": 5,
        "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
    }
    assert {"git_revision", "versions"} <= manifest.keys()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_damaged_checkpoint_is_skipped_naming_the_file(tmp_path: Path, caplog, harm, name: str):
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    harm(newer / name)
    assert find_checkpoint(tmp_path) == older
    assert str(newer / name) in caplog.text


def test_run_without_checkpoint_has_none(tmp_path: Path):
    assert find_checkpoint(tmp_path) is None


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path):
    kept = write(tmp_path, 1)
    (tmp_path / "checkpoints" / ".tmp_step_00000002").mkdir()
    (tmp_path / "checkpoints" / ".tmp_step_00000002" / "model.safetensors").write_bytes(b"half")
    remove_leftovers(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == [kept]


def test_pruning_keeps_the_newest_and_the_milestones(tmp_path: Path):
    for step in (10, 15, 20, 25, 30):
        write(tmp_path, step)
    prune(tmp_path, CheckpointConfig(keep_last=2, keep_every=10))
    assert [step_of(folder) for folder in list_checkpoints(tmp_path)] == [10, 20, 25, 30]


def test_checkpoint_of_the_same_step_is_replaced(tmp_path: Path):
    truncate(write(tmp_path, 3, note=b"old") / "model.safetensors")
    replaced = write(tmp_path, 3, note=b"new")
    assert find_checkpoint(tmp_path) == replaced
    assert (replaced / "note").read_bytes() == b"new"


def no_space(*args: object, **kwargs: object):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "module, name", [(os, "fsync"), (checkpoint, "save_file"), (checkpoint, "write_json"), (os, "rename")]
)
def test_full_disk_leaves_the_previous_checkpoint_and_no_rubbish(tmp_path: Path, monkeypatch, module, name: str):
    older = write(tmp_path, 1)
    monkeypatch.setattr(module, name, no_space)
    with pytest.raises(CheckpointError, match=r"step_00000002: rank 0: No space left on device.*Free disk space"):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert find_checkpoint(tmp_path) == older
    assert list((tmp_path / "checkpoints").iterdir()) == [older]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, where every write says the disk is full")
def test_torch_files_on_a_full_device_count_as_a_full_disk(tmp_path: Path):
    older = write(tmp_path, 1)

    def stage(folder: Path) -> None:
        (folder / "rank_00000.pt").symlink_to("/dev/full")
        torch.save({"x": torch.zeros(100_000)}, folder / "rank_00000.pt")

    with pytest.raises(CheckpointError, match="could not save"):
        write_checkpoint(tmp_path, 2, [stage], config={}, parallel=ALONE)
    assert list((tmp_path / "checkpoints").iterdir()) == [older]


def test_bug_in_a_stage_is_not_called_a_full_disk(tmp_path: Path):
    def stage(folder: Path) -> None:
        raise KeyError("typo")

    with pytest.raises(RuntimeError, match="KeyError") as caught:
        write_checkpoint(tmp_path, 2, [stage], config={}, parallel=ALONE)
    assert not isinstance(caught.value, CheckpointError)


def test_tied_and_strided_tensors_come_back_under_all_names(tmp_path: Path):
    tied, buffer = torch.rand(2, 3), torch.arange(10.0)
    state = {"a": tied, "b": tied, "part": buffer[2:5], "turned": tied.T}
    save_weights(tmp_path / "w.safetensors", state)
    got = read_weights(tmp_path / "w.safetensors")
    assert got.keys() == state.keys()
    assert all(torch.equal(got[name], state[name]) for name in state)
    assert got["a"].data_ptr() == got["b"].data_ptr()
    assert (tmp_path / "w.safetensors").stat().st_size < 600


def test_exported_folder_loads_again(tmp_path: Path):
    folder = export_weights(tmp_path / "out", {"w": torch.ones(3)}, {"width": 3}, "# Card")
    weights, config = load_weights(folder)
    assert torch.equal(weights["w"], torch.ones(3))
    assert config == {"width": 3}
    assert (folder / "README.md").read_text() == "# Card"
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_failed_export_leaves_the_earlier_one(tmp_path: Path, monkeypatch):
    folder = export_weights(tmp_path / "out", {"w": torch.ones(3)}, {}, "")
    monkeypatch.setattr(checkpoint, "save_file", no_space)
    with pytest.raises(CheckpointError, match="could not export.*No space left"):
        export_weights(folder, {"w": torch.zeros(3)}, {}, "")
    assert torch.equal(load_weights(folder)[0]["w"], torch.ones(3))


def test_run_folder_loads_its_newest_checkpoint_and_prefers_the_average(tmp_path: Path):
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    assert load_weights(tmp_path)[0]["w"].tolist() == [2.0, 2.0]
    save_weights(newest / "ema.safetensors", {"w": torch.zeros(2)})
    assert load_weights(newest)[0]["w"].tolist() == [0.0, 0.0]
    assert load_weights(newest, ema=False)[0]["w"].tolist() == [2.0, 2.0]


def test_missing_or_broken_weights_say_what_to_do(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_weights(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="neither manifest.json nor config.json"):
        load_weights(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="does not exist"):
        load_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="no readable safetensors file"):
        load_weights(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint yet"):
        load_weights(tmp_path)
