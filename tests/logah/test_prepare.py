"""The command that prepares data: it tells what there is, and names what it cannot use."""

import sys
from pathlib import Path

import pytest

from logah.prepare import main


def call(monkeypatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["prepare", *options])
    return main()


def test_images_are_described(monkeypatch, capsys):
    assert call(monkeypatch, "data=digits", "data.held_out=0.1", "data.batch_size=100") == 0
    out = capsys.readouterr().out
    assert "3 x 8 x 8, 10 classes" in out and "1,294 images" in out and "143 images\n" in out
    assert "13 steps of 100" in out


def test_text_is_tokenized_once(monkeypatch, capsys, tmp_path: Path):
    (tmp_path / "text").mkdir()
    for name, lines in (("train", 60), ("test", 20), ("valid", 20)):
        (tmp_path / "text" / f"{name}.txt").write_text("a line of text\n" * lines)
    options = [
        "data=local", f"data.name={tmp_path / 'text'}", "data.tokenizer=byte", "data.text_unit=line",
        "data.block_size=16", "data.num_workers=0", f"data.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    assert call(monkeypatch, *options) == 0
    out = capsys.readouterr().out
    assert "vocabulary 128" in out and "56 blocks of 60 documents, 900 tokens" in out
    caches = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("tokens.bin")}
    assert len(caches) == 3
    assert call(monkeypatch, *options) == 0
    assert {path: path.stat().st_mtime_ns for path in caches} == caches


def test_what_is_missing_is_named(monkeypatch, capsys, tmp_path: Path):
    for options, named in (
        (["data=cifar100", f"data.root={tmp_path}"], "data.download=true"),
        (["data=local"], "data.name"),
        (["data=digits", "data.held_out=2"], "data.held_out=2"),
        (["data=mnist"], "digits"),
    ):
        with pytest.raises(SystemExit) as stop:
            call(monkeypatch, *options)
        assert stop.value.code == 2
        assert named in capsys.readouterr().err
