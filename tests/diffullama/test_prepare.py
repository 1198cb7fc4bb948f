"""The command that prepares data: its output, and its exit codes."""

import json
import sys
from pathlib import Path

import pytest

from diffullama.packed import open_packed
from diffullama.prepare import main


def test_command_line_prepares_and_reports(tmp_path: Path, monkeypatch, capsys):
    fineweb = tmp_path / "fine.jsonl"
    fineweb.write_text("".join(json.dumps({"id": i, "text": f"document {i}"}) + "\n" for i in range(40)))
    out = tmp_path / "packed"
    options = [
        f"source={fineweb}",
        "format=packed",
        "tokenizer=byte",
        "length=9",
        "blocks_per_file=5",
        "progress=false",
    ]
    monkeypatch.setattr(sys, "argv", ["prepare", *options, f"output={out}"])
    assert main() == 0
    assert "documents 40" in capsys.readouterr().out
    assert open_packed(out, 9).info.blocks == 55
    monkeypatch.setattr(sys, "argv", ["prepare", *options, "lenght=3"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "length" in capsys.readouterr().err
