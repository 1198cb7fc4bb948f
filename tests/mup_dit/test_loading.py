"""Models of every source: our exports and runs, the reference's checkpoints, diffusers' folders."""

import argparse
import json
import logging
import pickle
from dataclasses import replace

import pytest
import torch

from common.errors import CheckpointError, ConfigError
from mup_dit.base_shapes import write_base_shapes
from mup_dit.building import build_model, compute_base_shapes
from mup_dit.loading import load_model, load_weights_into
from mup_dit.saving import save_diffusers, save_model, save_reference
from tests.mup_dit import tiny

FAMILIES = ("dit", "pixart", "mmdit")


def same(first, second, family: str) -> None:
    inputs = tiny.inputs(family)
    with torch.no_grad():
        assert torch.equal(first(*inputs), second(*inputs))


def close(first, second, family: str) -> None:
    inputs = tiny.inputs(family)
    with torch.no_grad():
        torch.testing.assert_close(first(*inputs), second(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_keeps_weights_multipliers_and_table(tmp_path, family):
    config = tiny.model_config(family, 8, output_mult=2.0)
    model = tiny.model(family, 8, output_mult=2.0).eval()
    save_model(tmp_path / "model", model, config, metadata={"objective": {"kind": "ddpm"}, "seed": 3})
    loaded = load_model(tmp_path / "model")
    same(loaded.model, model, family)
    assert loaded.config == config and loaded.metadata["seed"] == 3 and loaded.metadata["git_revision"]
    assert loaded.model.scalings == model.scalings


def test_an_export_needs_no_base_shape_file(tmp_path):
    config = tiny.model_config("dit", 8)
    path = write_base_shapes(tmp_path / "base.bsh", compute_base_shapes(config))
    config = replace(config, base_shapes=str(path))
    model = build_model(config, torch.Generator().manual_seed(0)).eval()
    save_model(tmp_path / "model", model, config)
    path.unlink()
    loaded = load_model(tmp_path / "model")
    same(loaded.model, model, "dit")
    assert loaded.model.final_layer.linear.mult == 0.5


def test_an_export_is_not_replaced_unasked(tmp_path):
    model, config = tiny.model(), tiny.model_config()
    save_model(tmp_path / "model", model, config)
    with pytest.raises(CheckpointError, match="overwrite=true"):
        save_model(tmp_path / "model", model, config)
    save_model(tmp_path / "model", model, config, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match="other files"):
        save_model(tmp_path / "other", model, config, overwrite=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_folders_in_both_directions(tmp_path, family):
    model = tiny.model(family, 8).eval()
    save_diffusers(tmp_path / "transformer", model)
    loaded = load_model(tmp_path)  # as a pipeline's folder
    close(loaded.model, model, family)
    assert loaded.config.parametrization == "sp" and loaded.config.network.depth == 2
    if family == "pixart":
        assert torch.equal(loaded.model.y_embedder.y_embedding, model.y_embedder.y_embedding)


def test_a_folded_checkpoint_loads_as_an_ordinary_network(tmp_path):
    model = tiny.model("dit", 8).eval()
    save_reference(tmp_path / "plain", model, tiny.model_config("dit", 8), folded=True)
    loaded = load_model(tmp_path / "plain", heads=8)
    close(loaded.model, model, "dit")
    assert loaded.config.parametrization == "sp" and loaded.model.final_layer.linear.mult == 1.0


@pytest.mark.parametrize("family", ["dit", "pixart"])
def test_unfolded_checkpoints_need_their_base_shapes(tmp_path, family):
    model = tiny.model(family, 8).eval()
    folder = save_reference(tmp_path / "mup", model, tiny.model_config(family, 8), folded=False)
    loaded = load_model(folder, heads=8, base_shapes=folder / "base_shapes.bsh")
    same(loaded.model, model, family)
    same(load_model(folder, heads=8, base_shapes="auto").model, model, family)
    assert loaded.model.final_layer.linear.mult == 0.5
    plain = load_model(folder, heads=8)
    inputs = tiny.inputs(family)
    with torch.no_grad():
        assert not torch.allclose(plain.model(*inputs), model(*inputs), atol=1e-3)


def checkpoint(**options) -> dict:
    state = tiny.model("dit", 8).state_dict()
    return {
        "model": {f"module.{name}": value for name, value in state.items()},
        "ema": {name: value + 1.0 for name, value in state.items()},
        "opt": {"state": {}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]},
        "args": argparse.Namespace(num_heads=8, num_classes=10, vae="mse", **options),
    }


def test_training_checkpoints_tell_heads_and_parametrisation(tmp_path):
    torch.save(checkpoint(mup=True, logstd=1), tmp_path / "0400000.pt")
    with pytest.raises(CheckpointError, match="trained by muP.*base_shapes"):
        load_model(tmp_path / "0400000.pt")
    loaded = load_model(tmp_path / "0400000.pt", base_shapes="auto", use_ema=False)
    assert loaded.model.final_layer.linear.mult == 2.0 * 0.5 and loaded.metadata["vae"] == "mse"
    assert torch.equal(loaded.model.x_embedder.proj.weight, tiny.model("dit", 8).x_embedder.proj.weight)
    averaged = load_model(tmp_path / "0400000.pt", base_shapes="auto").model.x_embedder.proj.weight
    assert torch.equal(averaged, loaded.model.x_embedder.proj.weight + 1.0)


def test_heads_are_checked_and_asked_for(tmp_path):
    torch.save(tiny.model("dit", 8).state_dict(), tmp_path / "bare.pt")
    with pytest.raises(CheckpointError, match="give heads="):
        load_model(tmp_path / "bare.pt")
    with pytest.raises(ConfigError, match="heads=7 does not divide"):
        load_model(tmp_path / "bare.pt", heads=7)
    save_model(tmp_path / "model", tiny.model("dit", 8), tiny.model_config("dit", 8))
    with pytest.raises(ConfigError, match="heads=4, but .* has 8"):
        load_model(tmp_path / "model", heads=4)


def test_published_sizes_are_read_off_the_tensors(tmp_path, caplog):
    """Width 144 has two heads of 72; PixArt for 512 pixels has its own grid, and one for 1024 its interpolation."""
    model = build_model(tiny.model_config("dit", 2, "sp", hidden_size=144, depth=1, input_size=16))
    torch.save(model.state_dict(), tmp_path / "DiT.pt")
    with caplog.at_level(logging.INFO):
        network = load_model(tmp_path / "DiT.pt").config.network
    assert (network.num_heads, network.input_size, network.num_classes, network.learn_sigma) == (2, 16, 10, True)
    assert "2 heads" in caplog.text
    config = tiny.model_config("pixart", 2, "sp", hidden_size=144, depth=1, lewei_scale=2.0, micro_conditions=True)
    torch.save({"state_dict": build_model(config).state_dict(), "epoch": 3}, tmp_path / "MS.pth")
    assert load_model(tmp_path / "MS.pth").config == config


class Hostile:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_is_executed_while_loading(tmp_path, capsys):
    torch.save({"model": {"x": torch.ones(1)}, "callback": Hostile()}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="without executing"):
        load_model(tmp_path / "bad.pt", heads=2)
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "raw.pt", heads=2)
    assert "executed" not in capsys.readouterr().out


def test_broken_and_missing_models_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no model"):
        load_model(tmp_path)
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(CheckpointError, match=r"cut\.pt is no readable checkpoint"):
        load_model(tmp_path / "cut.pt", heads=2)
    torch.save({"x": torch.ones(1)}, tmp_path / "cut.pt")
    with pytest.raises(CheckpointError, match="neither a DiT nor a PixArt"):
        load_model(tmp_path / "cut.pt", heads=2)
    folder = save_model(tmp_path / "model", tiny.model(), tiny.model_config())
    described = json.loads((folder / "config.json").read_text())
    described["model"]["hidden_size"] = 64
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"width 64.*instead of"):
        load_model(folder)
    del described["readouts"]
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="readouts"):
        load_model(folder)


@pytest.mark.parametrize("target", ["mup", "mup_init", "sp"])
def test_weights_from_elsewhere_keep_their_function(tmp_path, target):
    source = tiny.model("dit", 8).eval()
    save_model(tmp_path / "source", source, tiny.model_config("dit", 8))
    config = tiny.model_config("dit", 8, target, output_mult=4.0)
    model = build_model(config).eval()
    load_weights_into(model, tmp_path / "source", config)
    close(model, source, "dit")


def test_weights_of_another_width_are_refused(tmp_path):
    save_model(tmp_path / "source", tiny.model("dit", 8), tiny.model_config("dit", 8))
    config = tiny.model_config("dit", 4)
    with pytest.raises(CheckpointError, match="heads=4, but .* has 8"):
        load_weights_into(build_model(config), tmp_path / "source", config)
    config = tiny.model_config("pixart", 8)
    with pytest.raises(CheckpointError, match="is a dit, but model.family=pixart"):
        load_weights_into(build_model(config), tmp_path / "source", config)
