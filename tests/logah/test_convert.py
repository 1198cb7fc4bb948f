"""The command that converts hypernetworks."""

from pathlib import Path

from logah import convert as command
from logah.checkpoints import load_hypernetwork
from tests.logah.tiny_hypernetwork import assert_same_weights, tiny_hypernetwork, write_published


def test_the_command_converts_and_reports_errors(tmp_path: Path, monkeypatch, capsys):
    model = tiny_hypernetwork(decoder="dense", heads=4)
    path = write_published(tmp_path / "ghn3tm8.pt", model)

    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["logah.convert", *arguments])
        try:
            return command.main()
        except SystemExit as left:
            return left.code

    assert run(str(path), f"out={tmp_path / 'converted'}", "heads=4", "attention=as_is", "ve_cutoff=1") == 0
    loaded = load_hypernetwork(tmp_path / "converted")
    assert_same_weights(loaded.model, model)
    assert (loaded.config.heads, loaded.config.attention, loaded.config.ve_cutoff) == (4, "as_is", 1)
    assert loaded.metadata["source"] == "ghn3tm8.pt"
    assert str(tmp_path / "converted") in capsys.readouterr().out
    assert run(str(path), f"out={tmp_path / 'converted'}") == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert run(str(path), f"out={tmp_path / 'file.zip'}", "to=reference") == 2
    assert "ends in .pt" in capsys.readouterr().err
