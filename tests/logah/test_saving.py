"""Hypernetworks are written whole, once per tensor, and never over something else."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.errors import CheckpointError
from logah.checkpoints import convert, load_hypernetwork
from logah.saving import check_output, save_hypernetwork
from logah.unpickling import read_pickled
from tests.logah.tiny_hypernetwork import assert_same_weights, reference_state, tiny_hypernetwork


def test_shared_tensors_stay_shared_and_are_stored_once(tmp_path: Path):
    save_hypernetwork(tmp_path / "saved", tiny_hypernetwork())
    assert "decoder.seq.1.weight" not in load_file(tmp_path / "saved" / "model.safetensors")
    model = load_hypernetwork(tmp_path / "saved").model
    assert model.decoder.seq[1].weight is model.decoder.l2.weight


def test_nothing_is_replaced_unasked(tmp_path: Path):
    model = tiny_hypernetwork()
    folder = save_hypernetwork(tmp_path / "saved", model)
    with pytest.raises(CheckpointError, match="overwrite=true"):
        save_hypernetwork(folder, model)
    save_hypernetwork(folder, tiny_hypernetwork(seed=9), overwrite=True)
    assert not torch.equal(load_hypernetwork(folder).model.embed.weight, model.embed.weight)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="other files"):
        check_output(tmp_path / "other", overwrite=True)


@pytest.mark.parametrize("options", [{}, {"decoder": "dense"}])
def test_the_references_layout_round_trips(tmp_path: Path, options: dict):
    model = tiny_hypernetwork(**options)
    folder = save_hypernetwork(tmp_path / "saved", model)
    path = convert(folder, tmp_path / "model.pt", to="reference")
    content = torch.load(path, weights_only=True)
    expected = reference_state(model)
    assert content["state_dict"].keys() == expected.keys()
    assert all(torch.equal(content["state_dict"][name], value) for name, value in expected.items())
    assert content["config"]["lora"] == (model.config.decoder == "lowrank") and read_pickled(path)["epoch"] == 0
    loaded = load_hypernetwork(path)
    assert {k: v for k, v in asdict(loaded.config).items() if not k.startswith(("lora", "max_ck"))} == {
        k: v for k, v in asdict(model.config).items() if not k.startswith(("lora", "max_ck"))
    }
    assert_same_weights(loaded.model, model)
    with pytest.raises(CheckpointError, match="exists"):
        convert(folder, path, to="reference")
