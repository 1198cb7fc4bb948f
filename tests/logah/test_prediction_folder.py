"""Folders of weights: written once, read back exactly, by us and by the networks' own libraries."""

import json

import pytest
import torch

from common.errors import CheckpointError, DataError
from logah.architectures import gpt2, llama, resolve_target, vit
from logah.prediction_folder import (
    load_prediction,
    read_architecture,
    read_report,
    read_state,
    stored_tensors,
    write_module_folder,
)
from logah.shard_writer import INDEX_FILE

VIT = vit(patch_size=4, num_layers=1, num_heads=2, hidden_dim=16)
TIED = gpt2(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16, tie_word_embeddings=True,
            bos_token_id=1, eos_token_id=2)  # fmt: skip
LLAMA = llama(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
WITH_BUFFERS = resolve_target("torchvision:shufflenet_v2_x0_5")


@pytest.mark.parametrize("architecture", [VIT, TIED, LLAMA, WITH_BUFFERS], ids=str)
@pytest.mark.parametrize("max_shard_bytes", [2000, 10**9])
def test_a_network_comes_back_bit_for_bit(tmp_path, architecture, max_shard_bytes):
    module = architecture.build()
    folder = write_module_folder(
        tmp_path / "out", architecture, module, metadata={"seed": 3}, max_shard_bytes=max_shard_bytes
    )
    assert (folder / INDEX_FILE).exists() == (max_shard_bytes == 2000)
    assert read_architecture(folder) == architecture
    assert read_report(folder)["seed"] == 3
    found, expected = load_prediction(folder).state_dict(), module.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("architecture", [TIED, LLAMA], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_the_folder(tmp_path, architecture, dtype):
    from transformers import AutoModelForCausalLM

    module = architecture.build()
    folder = write_module_folder(tmp_path / "out", architecture, module, dtype=dtype, max_shard_bytes=3000)
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert loaded.dtype == dtype and type(loaded) is type(module)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, module.state_dict()[name].to(dtype)), name


def test_a_tied_weight_is_stored_once_also_from_a_network_without_numbers():
    for module in (TIED.build(), TIED.build_meta()):
        tensors, tied = stored_tensors(module)
        assert tied == {"lm_head.weight": "transformer.wte.weight"}
        assert sum(tensor.shape == (40, 16) for tensor in tensors) == 1
    assert stored_tensors(TIED.build()) == stored_tensors(TIED.build_meta())


def test_nothing_is_replaced_unasked(tmp_path):
    module = VIT.build()
    folder = write_module_folder(tmp_path / "out", VIT, module)
    with pytest.raises(CheckpointError, match="overwrite=true"):
        write_module_folder(folder, VIT, module)
    write_module_folder(folder, VIT, module, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("\\begin")
    with pytest.raises(CheckpointError, match="holds other files"):
        write_module_folder(tmp_path / "mine", VIT, module, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        write_module_folder(tmp_path / "file", VIT, module, overwrite=True)


def test_damaged_folders_are_named(tmp_path):
    folder = write_module_folder(tmp_path / "out", VIT, VIT.build(), max_shard_bytes=3000)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"architecture.json does not exist"):
        load_prediction(tmp_path / "empty")
    index = json.loads((folder / INDEX_FILE).read_text())
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": index["weight_map"] | {"more": "model-00001-of-00001"}}))
    with pytest.raises(CheckpointError, match="model-00001-of-00001 does not exist"):
        load_prediction(folder)
    (folder / INDEX_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="no readable JSON"):
        load_prediction(folder)


def test_a_network_of_ones_own_is_filled_but_never_imported_for_a_file(tmp_path):
    mine = resolve_target({"family": "module", "options": {"path": "torchvision.models:squeezenet1_1"}})
    folder = write_module_folder(tmp_path / "out", mine, mine.build())
    with pytest.raises(DataError, match="code to import"):
        load_prediction(folder)
    other = mine.build()
    assert load_prediction(folder, other) is other
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in read_state(folder).items())


def test_weights_of_another_network_are_refused(tmp_path):
    folder = write_module_folder(tmp_path / "out", VIT, VIT.build())
    other = vit(patch_size=4, num_layers=2, num_heads=2, hidden_dim=16)
    (folder / "architecture.json").write_text(json.dumps(other.to_json()))
    with pytest.raises(CheckpointError, match="do not fit VisionTransformer"):
        load_prediction(folder)
