"""A few steps of training are measured and leave nothing behind."""

import sys

from rpg.checkpoint_files import write_checkpoint
from rpg.memory import main
from tests.rpg.tiny_generator import networks


def test_ten_steps_are_measured(tmp_path, monkeypatch, capsys):
    for place, state in enumerate(networks()):
        write_checkpoint(tmp_path / "data" / f"{place}.pth", state)
    options = [
        f"data.checkpoints={tmp_path}/data", f"run_dir={tmp_path}/run", "data.dim_per_token=32", "model=digits",
        "model.d_model=32", "model.d_state=8", "model.channels=[1,4,8,4,1]", "training.batch_size=2",
        "training.diffusion_batch=8", "precision=fp32",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["rpg.memory", *options])
    assert main() == 0
    shown = capsys.readouterr().out
    assert "seconds per step" in shown and "peak memory gb" in shown and "resident" in shown
    assert not (tmp_path / "run").exists()
