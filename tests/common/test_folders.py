"""Folders appear whole or not at all."""

from pathlib import Path

import pytest

from common.errors import CheckpointError
from common.folders import write_folder


def test_a_folder_is_replaced_whole(tmp_path: Path):
    folder = tmp_path / "deep" / "model"
    write_folder(folder, lambda target: (target / "old").write_text("1"))
    assert write_folder(folder, lambda target: (target / "new").write_text("2")) == folder
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path):
    folder = tmp_path / "model"
    write_folder(folder, lambda target: (target / "old").write_text("1"))

    def fail(target: Path) -> None:
        (target / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="could not be written .No space left on device.; free disk space"):
        write_folder(folder, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in folder.iterdir()] == ["old"]
