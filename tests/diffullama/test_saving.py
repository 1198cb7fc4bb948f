"""Saved folders are complete or absent, and never replace what nobody asked to replace."""

import pytest

from common.errors import CheckpointError
from diffullama.convert import read_folder
from diffullama.loading import load_model, save_model
from diffullama.model import DiffusionLM
from diffullama.special_tokens import SpecialTokens
from tests.diffullama.hub_folders import (
    assert_same_state,
    tiny_hf,
)

MASK = 5


def adapted(family="gpt2", **options) -> tuple[DiffusionLM, SpecialTokens]:
    hf = tiny_hf(family, **options)
    return DiffusionLM(hf, MASK).eval(), SpecialTokens(MASK, 0, 0, 0, 12)


def test_existing_files_are_not_overwritten_unless_asked(tmp_path):
    model, special = adapted("gpt2")
    save_model(tmp_path / "out", model, None, special)
    other, _ = adapted("gpt2", seed=4)
    with pytest.raises(CheckpointError, match="overwrite=true"):
        save_model(tmp_path / "out", other, None, special)
    assert_same_state(load_model(tmp_path / "out").model.state_dict(), model.state_dict())
    save_model(tmp_path / "out", other, None, special, overwrite=True)
    assert_same_state(load_model(tmp_path / "out").model.state_dict(), other.state_dict())
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").write_text("mine")
    with pytest.raises(CheckpointError, match="holds other files"):
        save_model(tmp_path / "notes", model, None, special, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "out"]


def test_large_models_are_saved_in_shards(tmp_path):
    model, special = adapted("llama")
    save_model(tmp_path / "out", model, None, special, max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert_same_state(read_folder(tmp_path / "out"), model.hf.state_dict())
    assert_same_state(load_model(tmp_path / "out").model.state_dict(), model.state_dict())
