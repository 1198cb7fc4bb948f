"""Base-shape files: what is written, and what is refused."""

import pytest

from common.errors import CheckpointError
from mup_dit.base_shapes import read_base_shapes, write_base_shapes


def test_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.bsh do not exist; write them with"):
        read_base_shapes(tmp_path / "none.bsh")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("just words", "holds no mapping"),
        ("", "holds no mapping"),
        ("a: [1, x]", "entry 'a' is"),
        ("a: [1, -2]", "entry 'a' is"),
        ("a: 3", "entry 'a' is 3"),
        ("a: [1", "is not a base-shape file"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, text, message):
    (tmp_path / "x.bsh").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_base_shapes(tmp_path / "x.bsh")


def test_other_shapes_are_never_overwritten(tmp_path):
    path = write_base_shapes(tmp_path / "deep" / "a.bsh", {"w": (4, None)})
    with pytest.raises(CheckpointError, match="holds other base shapes; choose another name"):
        write_base_shapes(path, {"w": (8, None)})
    assert read_base_shapes(path) == {"w": (4, None)}


def test_entries_are_sorted_as_in_the_released_files(tmp_path):
    text = write_base_shapes(tmp_path / "a.bsh", {"b": (1,), "a": (None, 2)}).read_text().splitlines()
    assert [line[0] for line in text[:3]] == ["#"] * 3
    assert text[3:] == ["a:", "- null", "- 2", "b:", "- 1"]
