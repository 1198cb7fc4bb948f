"""Weights in every layout and naming give the same tensors; nothing is executed, nothing is ignored."""

import json
import logging
import pickle

import pytest
import torch
from safetensors.torch import save_file

from common.checkpoint import read_weights
from common.errors import CheckpointError
from diffullama.loading import load_model, save_model
from diffullama.model import DiffusionLM
from diffullama.special_tokens import SpecialTokens
from tests.diffullama.hub_folders import (
    assert_same_state,
    edit_json,
    tiny_hf,
    tiny_tokenizer,
    write_hub_folder,
    write_shards,
)

MASK = 5


def adapted(family="gpt2", **options) -> tuple[DiffusionLM, SpecialTokens]:
    hf = tiny_hf(family, **options)
    return DiffusionLM(hf, MASK).eval(), SpecialTokens(MASK, 0, 0, 0, 12)


def wrapper_state(model: DiffusionLM) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.reference_state_dict().items()}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_load_with_their_index_and_what_is_missing_is_named(tmp_path, suffix):
    hf = tiny_hf("llama")
    folder = write_shards(write_hub_folder(tmp_path, hf), hf.state_dict(), suffix=suffix)
    assert_same_state(load_model(folder, mask_token_id=MASK).model.hf.state_dict(), hf.state_dict())
    shards = sorted(folder.glob(f"*-of-00003.{suffix}"))
    shards[1].rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match=f"1 of 3 weight files are missing .{shards[1].name}"):
        load_model(folder, mask_token_id=MASK)
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(CheckpointError, match="disagree.*missing model.layers"):
        load_model(folder, mask_token_id=MASK)


def test_a_bare_backbone_loads_as_in_the_hub_s_gpt2(tmp_path):
    hf = tiny_hf("gpt2")
    folder = write_hub_folder(tmp_path, hf)
    state = {
        key.removeprefix("transformer."): value for key, value in hf.state_dict().items() if key != "lm_head.weight"
    }
    state["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file({key: value.clone() for key, value in state.items()}, folder / "model.safetensors")
    assert_same_state(load_model(folder, mask_token_id=MASK).model.hf.state_dict(), hf.state_dict())


def test_bin_files_that_would_execute_code_are_refused(tmp_path):
    folder = write_hub_folder(tmp_path, tiny_hf("gpt2"))
    (folder / "model.safetensors").unlink()
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump({"x": print}, file)
    with pytest.raises(CheckpointError, match="without executing code"):
        load_model(folder, mask_token_id=MASK)
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(folder, mask_token_id=MASK)
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no state dict"):
        load_model(folder, mask_token_id=MASK)


def test_every_missing_unexpected_and_misshapen_key_is_reported(tmp_path, caplog):
    hf = tiny_hf("llama")
    folder = write_hub_folder(tmp_path, hf)
    state = {key: value.clone() for key, value in hf.state_dict().items()}
    del state["model.norm.weight"], state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.2.mlp.up_proj.weight"] = torch.zeros(28, 16)
    state["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(8, 16)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_model(folder, mask_token_id=MASK)
    for part in (
        "4 differences",
        "missing model.norm.weight",
        "missing model.layers.1.mlp.up_proj.weight",
        "unexpected model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.weight has shape (8, 16), the model's is (16, 16)",
    ):
        assert part in str(error.value)
    with caplog.at_level(logging.WARNING):
        loaded = load_model(folder, mask_token_id=MASK, strict=False)
    assert "missing model.norm.weight" in caplog.text
    assert torch.equal(loaded.model.hf.lm_head.weight, hf.lm_head.weight)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_wrapper_keys_survive_the_way_there_and_back_bit_for_bit(family, tmp_path):
    model, special = adapted(family)
    state = wrapper_state(model)
    tied = family == "gpt2"
    assert ("lm_head.weight" in state) is not tied and next(iter(state)) == "embed_tokens.weight"
    save_model(tmp_path / "wrapper", model, tiny_tokenizer(), special, layout="reference", metadata={"max_length": 32})
    assert_same_state(read_weights(tmp_path / "wrapper" / "model.safetensors"), state)
    config = json.loads((tmp_path / "wrapper" / "config.json").read_text())
    assert config["task_specific_params"]["text-generation"]["max_length"] == 32
    loaded = load_model(tmp_path / "wrapper")
    assert_same_state(wrapper_state(loaded.model), state)
    assert_same_state(loaded.model.hf.state_dict(), model.hf.state_dict())
    assert loaded.length == 32


@pytest.mark.parametrize(
    "copies", [["embed_tokens.weight"], ["lm_head.weight"], ["embed_tokens.weight", "lm_head.weight"]]
)
def test_a_tied_matrix_loads_from_either_name(tmp_path, copies):
    model, special = adapted("gpt2")
    save_model(tmp_path / "out", model, None, special, layout="reference")
    state = wrapper_state(model)
    matrix = state.pop("embed_tokens.weight")
    save_file({**state, **{name: matrix.clone() for name in copies}}, tmp_path / "out" / "model.safetensors")
    loaded = load_model(tmp_path / "out").model
    assert_same_state(wrapper_state(loaded), wrapper_state(model))
    assert loaded.hf.lm_head.weight is loaded.hf.transformer.wte.weight


def test_copies_of_a_tied_matrix_that_differ_are_an_error(tmp_path):
    model, special = adapted("gpt2")
    save_model(tmp_path / "out", model, None, special, layout="reference")
    state = wrapper_state(model)
    state["lm_head.weight"] = state["embed_tokens.weight"] + 1
    save_file(state, tmp_path / "out" / "model.safetensors")
    with pytest.raises(CheckpointError, match="differ, but the configuration ties them"):
        load_model(tmp_path / "out")
    edit_json(tmp_path / "out" / "config.json", tie_word_embeddings=False)
    assert_same_state(wrapper_state(load_model(tmp_path / "out").model), state)


def test_old_files_that_hold_every_tensor_twice_and_constants_load(tmp_path):
    model, special = adapted("llama")
    save_model(tmp_path / "out", model, None, special, layout="reference")
    state = wrapper_state(model)
    twice = {**state, **{f"model.{key}": value for key, value in state.items()}}
    twice["denoise_model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    (tmp_path / "out" / "model.safetensors").unlink()
    torch.save(twice, tmp_path / "out" / "pytorch_model.bin")
    assert_same_state(wrapper_state(load_model(tmp_path / "out").model), state)
