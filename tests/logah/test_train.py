"""The command `python -m logah.train`: a run, what it would cost, and one-line errors."""

import sys
from pathlib import Path

import pytest

from common.cli import EXIT_USAGE
from logah import train

TINY = [
    "experiment=digits_minutes", "data.limit_train=32", "data.limit_test=16", "data.batch_size=16", "model.hid=16",
    "model.lora_r=4", "model.layers=1", "nets.depths=[1]", "nets.widths=[8]", "nets.heads=[2]", "training.steps=2",
    "training.valid_epoch=0", "tracking.progress=false", "parallel=none",
]  # fmt: skip


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["logah.train", *arguments])
    return train.main()


def test_a_run_ends_with_an_export(tmp_path: Path, monkeypatch, capsys):
    assert command(monkeypatch, *TINY, f"run_dir={tmp_path}/run") == 0
    assert (tmp_path / "run/export/model.safetensors").is_file()
    assert "hypernetwork in" in capsys.readouterr().err


@pytest.mark.parametrize("experiment", ["cifar100_large", "imagenet_ghn3_t", "wikitext2_gpt2_tiny"])
def test_dry_run_shows_published_sizes(tmp_path: Path, monkeypatch, capsys, experiment: str):
    assert command(monkeypatch, f"experiment={experiment}", "dry_run=true", f"run_dir={tmp_path}/run") == 0
    sizes = {"cifar100_large": "289,423,316", "imagenet_ghn3_t": "6,906,632", "wikitext2_gpt2_tiny": "2,540,620"}
    shown = capsys.readouterr()
    assert sizes[experiment] in shown.out + shown.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model.heads=3", "model.heads=3"),
        ("model.decoder=low", "model.decoder='low' is not known"),
        ("nets.set=absent.jsonl", "absent.jsonl cannot be read"),
        ("model.max_shape=[1,2,3]", "model.max_shape"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, monkeypatch, capsys, argument: str, message: str):
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, *TINY, f"run_dir={tmp_path}/run", argument)
    assert stopped.value.code == EXIT_USAGE
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()
