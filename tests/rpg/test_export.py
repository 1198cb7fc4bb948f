"""python -m rpg.export: a run's generator as one folder, or as a file of the released layout, and back."""

from dataclasses import replace

import pytest
import torch

from common.cli import run
from common.errors import CheckpointError, ConfigError
from rpg.export import ExportConfig, export
from rpg.loading import load_generator
from rpg.saving import save_generator
from tests.rpg.tiny_generator import tiny_facts, tiny_generator


def test_there_and_back_keeps_every_tensor(tmp_path, capsys):
    model, codec = tiny_generator(num_states=2)
    ours = save_generator(tmp_path / "ours", model, codec, tiny_facts(groups=("a", "b")), {"seed": 5})
    released = str(tmp_path / "out" / "generator.pth")
    export(ExportConfig(generator=str(ours), output=released, to="reference"))
    back = str(tmp_path / "back")
    export(ExportConfig(generator=released, structure=str(ours / "codec"), output=back))
    assert capsys.readouterr().out.split() == [released, back]
    loaded = load_generator(back)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    assert replace(loaded.config, chunk_size=model.config.chunk_size) == model.config
    assert loaded.metadata["source"] == "generator.pth"
    with pytest.raises(CheckpointError, match="overwrite=true"):
        export(ExportConfig(generator=str(ours), output=released, to="reference"))
    with pytest.raises(CheckpointError, match="overwrite=true"):
        export(ExportConfig(generator=str(ours), output=back))


def test_the_command_line(tmp_path, monkeypatch, capsys):
    model, codec = tiny_generator()
    folder = save_generator(tmp_path / "ours", model, codec, tiny_facts())
    monkeypatch.setattr("sys.argv", ["export", f"generator={folder}", f"output={tmp_path / 'copy'}"])
    assert run(export, "export", ExportConfig, "configs/rpg", print_config=False) == 0
    assert load_generator(tmp_path / "copy").digest == load_generator(folder).digest
    with pytest.raises(ConfigError, match=r"ends in \.pth"):
        ExportConfig(generator="a", output="b", to="reference")
