"""The command of training: a run from options to export, resumed, continued from its weights, estimated."""

import json
from pathlib import Path

import pytest
import torch

from common.checkpoint import load_weights
from common.errors import CheckpointError, ConfigError
from common.tracking import read_records
from mup_dit import train as entry
from mup_dit.base_shapes import read_base_shapes
from mup_dit.loading import load_model
from tests.mup_dit.test_config import build

TINY = (
    "parallel=none", "precision=fp32", "tracking.progress=false", "training.batch_size=16", "training.log_freq=1",
    "training.save_freq=2", "optim.warmup=0", "mup.loglr=-7", "sampling.images=4", "sampling.steps=2",
    "model.depth=1", "model.hidden_size=128", "model.num_heads=8",
)  # fmt: skip


def train(run_dir: Path, steps: int, *overrides: str) -> int:
    return entry.train(build(*TINY, *overrides, f"run_dir={run_dir}", f"training.n_iters={steps}"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("train") / "run"
    assert train(run_dir, 4, "training.eval_freq=2", "training.snapshot_freq=2") == 0
    return run_dir


def test_a_run_leaves_metrics_samples_snapshots_and_an_export(finished):
    records = read_records(finished)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert {"validation/loss", "validation/mse"} <= records[-1].keys()
    assert (finished / "samples" / "iter_2.png").stat().st_size > 0
    assert (finished / "samples" / "iter_4.png").is_file()
    assert (finished / "snapshots" / "iter_2" / "model.safetensors").is_file()
    described = json.loads((finished / "export" / "config.json").read_text())
    multipliers = {row["name"]: row["lr_mult"] for row in described["table"]}
    assert multipliers["blocks.0.attn.qkv.weight"] == 0.5
    assert described["objective"]["kind"] == "ddpm"


def test_export_holds_the_averaged_weights_and_their_multipliers(finished):
    loaded = load_model(finished / "export")
    expected = load_weights(finished)[0]
    assert all(torch.equal(value, expected[name]) for name, value in loaded.model.state_dict().items())
    assert loaded.model.final_layer.linear.mult == 0.5
    assert not torch.equal(
        expected["blocks.0.attn.qkv.weight"], load_weights(finished, ema=False)[0]["blocks.0.attn.qkv.weight"]
    )


def test_the_same_command_continues_bit_for_bit(finished, tmp_path):
    assert train(tmp_path / "cut", 2, "training.eval_freq=2", "training.snapshot_freq=2") == 0
    assert (
        train(tmp_path / "cut", 4, "training.eval_freq=2", "training.snapshot_freq=2", "allow_config_change=true") == 0
    )
    expected, found = load_weights(finished, ema=False)[0], load_weights(tmp_path / "cut", ema=False)[0]
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    losses = [[record["train/loss"] for record in read_records(run)] for run in (finished, tmp_path / "cut")]
    assert losses[0] == losses[1]


def test_training_starts_from_given_weights_of_the_same_width_only(finished, tmp_path):
    assert train(tmp_path / "more", 1, f"init_from={finished}", "optim.lr=0.0", "mup.loglr=null") == 0
    expected, found = load_weights(finished)[0], load_weights(tmp_path / "more", ema=False)[0]
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    with pytest.raises((CheckpointError, ConfigError), match="model.num_heads=4, but .* has 8; train at its width"):
        train(tmp_path / "other", 1, f"init_from={finished}", "model.hidden_size=64", "model.num_heads=4")


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("pixart", ("model=pixart-digits", "data=digits-captions")),
        ("mmdit", ("model=mmdit-digits", "data=digits-captions", "objective=flow")),
    ],
)
def test_text_models_train_and_sample(tmp_path, family, overrides):
    assert train(tmp_path / "run", 2, *overrides) == 0
    loaded = load_model(tmp_path / "run" / "export")
    assert loaded.config.family == family
    assert loaded.metadata["text"]["kind"] == "small"
    assert (tmp_path / "run" / "samples" / "iter_2.png").is_file()


def test_base_shapes_are_written_instead_of_a_run(tmp_path, capsys):
    assert train(tmp_path / "run", 2, f"save_base_shapes={tmp_path / 'w.bsh'}") == 0
    assert not (tmp_path / "run").exists()
    assert read_base_shapes(tmp_path / "w.bsh")["blocks.0.attn.qkv.weight"] == (192, 64)
    assert "base width 64" in capsys.readouterr().err
    assert train(tmp_path / "run", 1, f"model.base_shapes={tmp_path / 'w.bsh'}") == 0
    with pytest.raises(ConfigError, match="Base shapes belong to one depth"):
        train(tmp_path / "deep", 1, f"model.base_shapes={tmp_path / 'w.bsh'}", "model.depth=2")


@pytest.mark.parametrize("experiment", ["dit_xl_2_mup", "mmdit_mup_target", "pixart_mup_target"])
def test_estimates_allocate_no_weight(experiment, capsys):
    """Two blocks each: 18 B parameters and their activations take seconds more, and show nothing else."""
    assert entry.train(build(f"experiment={experiment}", "model.depth=2", "dry_run=true")) == 0
    assert "estimated memory per process" in capsys.readouterr().out


def test_epochs_become_steps_and_losses_need_held_out_images(tmp_path):
    assert train(tmp_path / "run", 999, "training.batch_size=512", "training.epochs=1") == 0
    assert read_records(tmp_path / "run")[-1]["step"] == 3
    with pytest.raises(ConfigError, match=r"name data.valid, or set it to 0"):
        train(tmp_path / "none", 2, "training.eval_freq=1", "data.valid=null")
