"""A folder of checkpoints as training data: cache, changes, groups, conditions, generation-only mode."""

import json
import logging
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from common.errors import ConfigError, DataError
from rpg import token_cache
from rpg.data import DataSection, build_conditions, build_data, group_checkpoints
from rpg.manifest import Manifest, compute_manifest
from rpg.store import TokenStore


def make_folder(folder, count=4, seeds=2, tag="tiny"):
    folder.mkdir(parents=True)
    for index in range(count):
        torch.manual_seed(index)
        network = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        torch.save(network.state_dict(), folder / f"{index:04d}_acc0.9000_seed{index % seeds:04d}_{tag}.pth")
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "nets")


def section(folder, **options):
    return DataSection(checkpoints=str(folder), dim_per_token=8, **options)


@pytest.mark.parametrize("options", [{}, {"normalisation": "residual"}, {"granularity": 0, "fill_value": 0.0}])
def test_tokens_are_those_of_the_files(folder, options):
    data = build_data(section(folder, **options))
    assert len(data.tokens) == 4 and not data.generation_only
    for index, name in enumerate(data.names):
        state = torch.load(folder / name, weights_only=True)
        assert torch.equal(data.tokens.network(index).nan_to_num(7), data.codec.encode(state).nan_to_num(7))
    network_R, token_R = torch.tensor([3, 0, 3]), torch.tensor([1, 2, 0])
    rows = data.tokens.gather(network_R, token_R)
    assert torch.equal(rows[0].nan_to_num(7), data.tokens.network(3)[1].nan_to_num(7))
    assert rows.shape == (3, 8)


def test_the_second_time_nothing_is_read(folder, monkeypatch):
    first = build_data(section(folder))

    def refuse(*_arguments):
        raise AssertionError("a checkpoint was read again")

    monkeypatch.setattr("rpg.token_cache.read_checkpoint", refuse)
    again = build_data(section(folder))
    assert again.manifest.digest == first.manifest.digest
    assert np.array_equal(again.tokens.network(2), first.tokens.network(2), equal_nan=True)


def change_one(folder):
    path = sorted(folder.iterdir())[1]
    state = torch.load(path, weights_only=True)
    state["0.bias"] = state["0.bias"] + 1
    before = path.stat()
    torch.save(state, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # not even the time of change gives it away
    return "changed: 0001_acc0.9000_seed0001_tiny.pth"


def remove_one(folder):
    sorted(folder.iterdir())[0].unlink()
    return "removed: 0000_acc0.9000_seed0000_tiny.pth"


def add_one(folder):
    shutil.copy(sorted(folder.iterdir())[0], folder / "0009_acc0.9_seed0001_new.pth")
    return "added: 0009_acc0.9_seed0001_new.pth"


@pytest.mark.parametrize("change", [change_one, remove_one, add_one])
def test_changed_checkpoints_are_named_and_everything_is_made_again(folder, caplog, change):
    build_data(section(folder))
    message = change(folder)
    with caplog.at_level(logging.WARNING):
        data = build_data(section(folder))
    assert message in caplog.text
    for index, name in enumerate(data.names):
        state = torch.load(folder / name, weights_only=True)
        assert torch.equal(data.tokens.network(index).nan_to_num(7), data.codec.encode(state).nan_to_num(7))
    caplog.clear()
    build_data(section(folder))
    assert not caplog.text


def test_a_copied_folder_keeps_its_cache_and_order(folder, tmp_path, monkeypatch):
    first = build_data(section(folder))
    copy = tmp_path / "elsewhere" / "nets"
    copy.mkdir(parents=True)
    for path in sorted(folder.iterdir(), reverse=True):  # another order of creation
        shutil.copy(path, copy)
    shutil.copytree(tmp_path / "nets.rpg", tmp_path / "elsewhere" / "nets.rpg")
    monkeypatch.setattr("rpg.token_cache.read_checkpoint", lambda path: pytest.fail("read again"))
    second = build_data(section(copy))
    assert second.names == first.names and torch.equal(second.group_K, first.group_K)
    assert second.manifest.digest == first.manifest.digest


def test_selections_of_one_folder_do_not_disturb_each_other(folder, caplog):
    whole = build_data(section(folder))
    part = build_data(section(folder, pattern="*seed0001*"))
    assert len(part.tokens) == 2 and part.groups == ("seed0001",)
    assert len(build_data(section(folder, limit=3)).tokens) == 3
    assert len(build_data(section(folder)).tokens) == 4
    assert not caplog.text and len(whole.tokens.network(3)) == whole.codec.num_tokens


def test_processes_that_start_together_read_the_checkpoints_once(folder, monkeypatch):
    reads = []
    original = token_cache.read_checkpoint
    monkeypatch.setattr(token_cache, "read_checkpoint", lambda path: reads.append(path) or original(path))
    with ThreadPoolExecutor(4) as pool:  # file locks hold between threads as between processes
        found = list(pool.map(build_data, [section(folder)] * 4))
    assert len(reads) == 8  # once for the statistics, once for the tokens
    assert all(np.array_equal(data.tokens.network(3), found[0].tokens.network(3), equal_nan=True) for data in found)


def test_a_cache_inside_the_folder_is_no_checkpoint(folder):
    for _ in range(2):
        data = build_data(section(folder, cache_dir=str(folder / "cache")))
        assert len(data.names) == 4 and not any("cache" in name for name in data.names)


def test_a_damaged_token_file_is_made_again(folder, caplog):
    first = build_data(section(folder)).tokens.network(1)
    (path,) = folder.parent.glob("nets.rpg/all/tokens*/tokens.bin")
    path.write_bytes(b"\0" * path.stat().st_size)
    again = build_data(section(folder)).tokens.network(1)
    assert "damaged" in caplog.text and torch.equal(first.nan_to_num(7), again.nan_to_num(7))


def test_a_damaged_manifest_is_made_again(folder, caplog):
    build_data(section(folder))
    (folder.parent / "nets.rpg" / "all" / "manifest.json").write_text("{")
    assert len(build_data(section(folder)).tokens) == 4
    assert "is damaged" in caplog.text


def test_without_checkpoints_the_manifest_is_enough_to_generate(folder):
    data = build_data(section(folder))
    tokens_LD = data.tokens.network(2)
    shutil.rmtree(folder)
    alone = build_data(section(folder))
    assert alone.generation_only and alone.groups == data.groups and alone.names == data.names
    found, expected = alone.codec.decode(tokens_LD), data.codec.decode(tokens_LD)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(DataError, match="no checkpoint to train on"):
        alone.require_tokens()
    with pytest.raises(DataError, match=r"residual structure.*data\.normalisation=layer"):
        build_data(section(folder, normalisation="residual"))


def test_empty_folders_and_wrong_patterns_are_named(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data\.checkpoints=.*empty holds no checkpoint"):
        build_data(section(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"data\.checkpoints=.*absent does not exist"):
        build_data(section(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"data\.pattern=\*\.bin fits none of the 4"):
        build_data(section(folder, pattern="*.bin"))
    with pytest.raises(ConfigError, match=r"data\.checkpoints is not set"):
        build_data(DataSection())


def test_checkpoints_that_differ_stop_before_training(folder):
    torch.save({"0.weight": torch.ones(2, 2)}, folder / "zz_other.pth")
    with pytest.raises(DataError, match=r"zz_other\.pth.*0\.bias|zz_other\.pth: key '0\.weight' has shape \(2, 2\)"):
        build_data(section(folder, groups="none"))


def test_a_cache_that_cannot_be_written_is_named(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache_dir=.*file"):
        build_data(section(folder, cache_dir=str(tmp_path / "file")))


def test_token_stores_travel_to_other_processes_as_a_path(folder):
    tokens = build_data(section(folder)).tokens
    sent = pickle.dumps(tokens)
    assert len(sent) < 1000
    assert np.array_equal(pickle.loads(sent).network(1), tokens.network(1), equal_nan=True)
    memory = TokenStore(torch.randn(2, 3, 4))
    assert torch.equal(pickle.loads(pickle.dumps(memory)).network(1), memory.network(1))


def test_files_are_trusted_unread_only_if_nothing_can_have_changed(folder):
    paths = sorted(folder.iterdir())
    names = [path.name for path in paths]
    first = compute_manifest(paths, names)
    later = Manifest(first.files, first.checked_ns + int(10e9))
    reads = []

    def counted(files):
        reads.append(files)
        return "digest"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rpg.manifest._sha256", counted)
        compute_manifest(paths, names, later)
        assert not reads
        compute_manifest(paths, names, first)  # written within the clock's last ticks before the check
        assert len(reads) == 4


NAMES = ["b/0001_acc0.9_seed0003_class0007_x.pth", "b/0002_acc0.9_seed0001_class0793_x.pth", "a/0003_acc0.9_seed0003_class0007_x.pth"]  # fmt: skip # noqa: E501


@pytest.mark.parametrize(
    "groups, index, labels",
    [
        ("auto", [1, 0, 1], ("seed0001", "seed0003")),
        ("seed", [1, 0, 1], ("seed0001", "seed0003")),
        ("class", [0, 1, 0], ("class0007", "class0793")),
        ("folder", [1, 1, 0], ("a", "b")),
        ("none", [0, 0, 0], ("all",)),
        ("file", [1, 2, 0], tuple(sorted(NAMES))),
    ],
)
def test_groups(groups, index, labels):
    index_K, found = group_checkpoints(NAMES, groups)
    assert index_K.tolist() == index and found == labels


def test_automatic_groups_without_seeds():
    assert group_checkpoints(["x/1.pth", "y/1.pth"], "auto")[1] == ("x", "y")
    assert group_checkpoints(["1.pth", "2.pth"], "auto")[1] == ("all",)
    with pytest.raises(DataError, match=r"data\.groups=seed needs a field seedNNNN.*1\.pth"):
        group_checkpoints(["1.pth"], "seed")


def test_conditions_of_file_names():
    assert build_conditions(NAMES, "none") is None
    assert build_conditions(NAMES, "seed").tolist() == [[3], [1], [3]]
    bits = build_conditions(NAMES, "class")
    assert bits.tolist()[0] == [0] * 7 + [1] * 3 and bits.shape == (3, 10)
    with pytest.raises(DataError, match="1023"):
        build_conditions(["0001_acc0.9_class1023_x.pth"], "class")


def test_conditions_of_a_file(tmp_path):
    path = tmp_path / "features.json"
    path.write_text(json.dumps({NAMES[0]: [1, 2.5], NAMES[1].split("/")[1]: [0, 1], NAMES[2]: [3, 4]}))
    assert build_conditions(NAMES, "file", str(path)).tolist() == [[1, 2.5], [0, 1], [3, 4]]
    for entry, message in (({}, "no entry for b/0001"), ({NAMES[0]: ["x"]}, "finite numbers"),
                           ({NAMES[0]: [1], NAMES[1]: [1, 2]}, "2 numbers")):  # fmt: skip
        path.write_text(json.dumps(entry))
        with pytest.raises(DataError, match=message):
            build_conditions(NAMES, "file", str(path))
    with pytest.raises(ConfigError, match="set both"):
        DataSection(condition="file")


def test_conditions_reach_the_data(folder):
    data = build_data(section(folder, condition="seed"))
    assert data.condition_KC.tolist() == [[0], [1], [0], [1]]
