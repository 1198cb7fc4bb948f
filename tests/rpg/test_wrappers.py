"""Wrappers of other programs come off and go back on; the command does it for files and folders."""

import sys

import pytest
import torch

from common.errors import CheckpointError, DataError
from rpg import convert as command
from rpg.checkpoint_files import read_checkpoint
from rpg.wrappers import convert, read_ignoring_objects, wrap


class History:
    """A training program's own object."""

    ran = False

    def __init__(self):
        self.values = [1, 2]

    def __setstate__(self, state):
        History.ran = True


def test_a_wrapper_comes_off_and_goes_back_on(tmp_path):
    original = {"meta": {"classes": ["a", "b"]}, "state_dict": {"w": torch.randn(3)}, "epoch": 4}
    torch.save(original, tmp_path / "original.pth")
    (plain,) = convert(tmp_path / "original.pth", tmp_path / "plain.safetensors", "plain", suffix=".safetensors")
    assert torch.equal(read_checkpoint(plain)["w"], original["state_dict"]["w"])
    (wrapped,) = convert(plain, tmp_path / "wrapped.pth", "wrapped", template=tmp_path / "original.pth")
    found = torch.load(wrapped, weights_only=True)
    assert found["meta"] == original["meta"] and found["epoch"] == 4 and list(found) == list(original)
    assert torch.equal(found["state_dict"]["w"], original["state_dict"]["w"])
    assert wrap({"w": torch.ones(1)})["meta"] == {}


def test_a_network_that_does_not_fit_the_template_is_named():
    with pytest.raises(DataError, match=r"key 'w' has shape \(2,\), but \(3,\) in the template"):
        wrap({"w": torch.ones(2)}, {"state_dict": {"w": torch.ones(3)}})
    with pytest.raises(CheckpointError, match="the template has none of the entries"):
        wrap({"w": torch.ones(2)}, {"w": torch.ones(3)})


def test_foreign_objects_are_left_out_without_running_their_code(tmp_path):
    path = tmp_path / "training.pth"
    torch.save({"state_dict": {"w": torch.ones(2)}, "log": {"history": [History()]}, "meta": {"epoch": 1}}, path)
    with pytest.raises(CheckpointError, match="objects other than tensors"):
        convert(path, tmp_path / "out.pth", "plain")
    found = read_ignoring_objects(path)
    assert set(found) == {"state_dict", "meta"} and not History.ran
    (plain,) = convert(path, tmp_path / "out.pth", "plain", ignore_objects=True)
    assert torch.equal(read_checkpoint(plain)["w"], torch.ones(2))


def test_the_command_converts_folders_and_refuses_with_a_message(tmp_path, monkeypatch, capsys):
    for index in range(2):
        (tmp_path / "in" / "deep").mkdir(parents=True, exist_ok=True)
        torch.save({"meta": {}, "state_dict": {"w": torch.ones(2) * index}}, tmp_path / "in" / "deep" / f"{index}.pth")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        return command.main()

    assert call(tmp_path / "in", tmp_path / "out", "format=safetensors") == 0
    assert read_checkpoint(tmp_path / "out" / "deep" / "1.safetensors")["w"].tolist() == [1, 1]
    assert "deep/1.safetensors" in capsys.readouterr().out
    for arguments, message in (
        ((tmp_path / "in", tmp_path / "out", "format=safetensors"), "exists and is not replaced"),
        ((tmp_path / "in", tmp_path / "x", "to=fork"), "converts adapters only"),
        ((tmp_path / "in", tmp_path / "x", "to=warped"), "wrapped"),
        ((tmp_path / "in", tmp_path / "x", "template=a.pth"), "to=wrapped only"),
        ((tmp_path / "absent.pth", tmp_path / "x"), "does not exist"),
    ):
        with pytest.raises(SystemExit) as stop:
            call(*arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err
