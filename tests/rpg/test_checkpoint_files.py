"""Reading and writing single networks: formats, wrappers, refusals, and that nothing is overwritten or half written."""

import collections
import json

import pytest
import torch
from torch import nn

from common.errors import CheckpointError
from rpg.checkpoint_files import find_checkpoints, names_of, read_checkpoint, read_metadata, write_checkpoint


@pytest.fixture
def state():
    shared = torch.randn(4, 3)
    return {
        "z.weight": shared,
        "a.weight": shared,
        "bf16": torch.randn(5).bfloat16(),
        "steps": torch.tensor(3),
        "view": torch.arange(100.0)[10:20],
        "columns": torch.randn(3, 6).t(),
    }


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_a_network_comes_back_with_order_and_ties(tmp_path, state, name):
    path = write_checkpoint(tmp_path / "deep" / name, state, metadata={"seed": 3, "generator": "abc"})
    found = read_checkpoint(path)
    assert list(found) == list(state)
    for key, tensor in state.items():
        assert torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype
    assert found["a.weight"].data_ptr() == found["z.weight"].data_ptr()
    assert read_metadata(path) == {"seed": 3, "generator": "abc"}
    assert path.stat().st_size < 4000  # views are written without the tensors that they look into


def test_written_files_are_plain_state_dicts_for_other_programs(tmp_path):
    from safetensors.torch import load_file

    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    network.tied = network[0]
    for name in ("net.pth", "net.safetensors"):
        path = write_checkpoint(tmp_path / name, network.state_dict(), metadata={"a": 1})
        loaded = load_file(path) if name.endswith("safetensors") else torch.load(path, weights_only=True)
        network.load_state_dict(loaded, strict=True)


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_nothing_is_overwritten_unless_asked(tmp_path, name):
    path = write_checkpoint(tmp_path / name, {"w": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"exists and is not replaced; add overwrite=true"):
        write_checkpoint(path, {"w": torch.ones(2)})
    assert torch.equal(read_checkpoint(path)["w"], torch.zeros(2))
    write_checkpoint(path, {"w": torch.ones(2)}, overwrite=True)
    assert torch.equal(read_checkpoint(path)["w"], torch.ones(2))
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_json_file_of_someone_else_beside_a_network_stays(tmp_path):
    beside = tmp_path / "net.json"
    beside.write_text('{"mine": 1}')
    with pytest.raises(CheckpointError, match=r"net\.json exists"):
        write_checkpoint(tmp_path / "net.pth", {"w": torch.ones(2)}, metadata={"seed": 1})
    assert beside.read_text() == '{"mine": 1}' and not (tmp_path / "net.pth").exists()
    beside.write_text('{"seed": 0}')  # of a run that was killed between the two files
    write_checkpoint(tmp_path / "net.pth", {"w": torch.ones(2)}, metadata={"seed": 1})
    assert read_metadata(tmp_path / "net.pth") == {"seed": 1}


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_checkpoint(tmp_path / "net.pth", {"w": torch.ones(2)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_wrappers_are_taken_off(tmp_path, wrapper):
    inner = collections.OrderedDict(w=nn.Parameter(torch.randn(3)))
    torch.save({"meta": {"epoch": 3}, wrapper: inner}, tmp_path / "net.pth")
    found = read_checkpoint(tmp_path / "net.pth")
    assert list(found) == ["w"] and not found["w"].requires_grad


class Stranger:
    """An object that a state dict must not hold."""


def test_files_that_are_no_state_dicts_are_named(tmp_path):
    torch.save({"w": torch.ones(2), "who": Stranger()}, tmp_path / "object.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"w": torch.ones(2), "epoch": 3}, tmp_path / "mixed.pth")
    torch.save({}, tmp_path / "nothing.pth")
    (tmp_path / "noise.pth").write_bytes(b"no checkpoint at all")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("object.pth", r"object\.pth holds objects other than tensors.*Stranger"),
        ("list.pth", "holds a list, not a state dict"),
        ("mixed.pth", "key 'epoch' is of type int"),
        ("nothing.pth", "holds no tensor"),
        ("noise.pth", r"noise\.pth"),
        ("cut.safetensors", r"cut\.safetensors cannot be read"),
        ("folder", r"folder without adapter_config\.json"),
        ("absent.pth", "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(tmp_path / name)


def test_large_and_old_files_can_be_read(tmp_path, monkeypatch):
    shared = torch.randn(8)
    state = {"a": shared, "b": shared, "c": torch.arange(4)}
    torch.save(state, tmp_path / "new.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    monkeypatch.setattr("rpg.checkpoint_files.MAP_FILES_FROM_BYTES", 1)
    for name in ("new.pth", "old.pth"):
        found = read_checkpoint(tmp_path / name)
        assert all(torch.equal(found[key], state[key]) for key in state)
        assert found["a"].data_ptr() == found["b"].data_ptr()


def test_foreign_safetensors_are_read_in_the_order_of_their_layers(tmp_path):
    from safetensors.torch import save_file

    save_file({f"layers.{i}.w": torch.ones(1) * i for i in (10, 2, 1)}, tmp_path / "x.safetensors")
    assert list(read_checkpoint(tmp_path / "x.safetensors")) == ["layers.1.w", "layers.2.w", "layers.10.w"]


def test_checkpoints_are_found_in_a_fixed_order(tmp_path):
    names = ["b/2.pth", "a/10.safetensors", "a/9.pt", "c.bin", "B.ckpt"]
    for name in [*reversed(names), "notes.txt", ".hidden.pth", "x.rpg/all/tokens.pth", "c.json"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "z_adapter").mkdir()
    (tmp_path / "z_adapter" / "adapter_config.json").write_text(json.dumps({}))
    (tmp_path / "z_adapter" / "adapter_model.bin").touch()
    found = names_of(find_checkpoints(tmp_path), tmp_path)
    assert found == ["B.ckpt", "a/10.safetensors", "a/9.pt", "b/2.pth", "c.bin", "z_adapter"]
    assert names_of(find_checkpoints(tmp_path, "a/*"), tmp_path) == ["a/10.safetensors", "a/9.pt"]
    assert names_of(find_checkpoints(tmp_path, "*.pth"), tmp_path) == ["b/2.pth"]
    with pytest.raises(CheckpointError, match="is one adapter"):
        find_checkpoints(tmp_path / "z_adapter")
    with pytest.raises(CheckpointError, match="is no folder"):
        find_checkpoints(tmp_path / "absent")
