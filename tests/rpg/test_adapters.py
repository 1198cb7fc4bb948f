"""PEFT adapters: they tokenise, a generated one loads and runs in peft, and the fork's names convert both ways."""

import json

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.errors import CheckpointError, DataError
from rpg.adapters import (
    is_fork_adapter,
    read_adapter,
    read_adapter_config,
    to_fork_config,
    to_fork_names,
    to_peft_config,
    to_peft_names,
)
from rpg.checkpoint_files import read_checkpoint, read_metadata, write_checkpoint
from rpg.data import DataSection, build_data
from rpg.wrappers import convert


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def save_adapters(folder, count=3, rank=2, dora=True):
    options = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "down_proj"], use_dora=dora)
    model = peft.get_peft_model(base_model(), options)
    for index in range(count):
        torch.manual_seed(index)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data.copy_(parameter.data + 0.1 * torch.randn(parameter.shape))
        model.save_pretrained(folder / f"adapter_{index:03d}")
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return save_adapters(tmp_path_factory.mktemp("peft") / "dora")


@pytest.fixture(scope="module")
def data(adapters):
    return build_data(DataSection(checkpoints=str(adapters), dim_per_token=32))


def logits(adapter) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(base_model(), adapter).eval()
    with torch.no_grad():
        return model(torch.arange(7)[None]).logits


def test_adapters_tokenise_and_come_back(data, adapters):
    assert data.names == ("adapter_000", "adapter_001", "adapter_002")
    assert data.adapter_config["r"] == 2 and data.adapter_config["use_dora"]
    state = read_checkpoint(adapters / "adapter_001")
    assert sum("lora_magnitude_vector" in name for name in state) == 4
    restored = data.codec.decode(data.tokens.network(1))
    assert all(torch.allclose(restored[name], state[name], atol=1e-6) for name in state)


def test_a_generated_adapter_loads_in_peft_and_runs(data, adapters, tmp_path):
    path = tmp_path / "generated"
    write_checkpoint(path, data.codec.decode(data.tokens.network(2)), "peft", {"seed": 4},
                     adapter_config=data.adapter_config)  # fmt: skip
    assert torch.allclose(logits(path), logits(adapters / "adapter_002"), atol=1e-5)
    assert not torch.allclose(logits(path), base_model()(torch.arange(7)[None]).logits, atol=1e-3)
    assert read_metadata(path) == {"seed": 4}
    with pytest.raises(CheckpointError, match="exists and is not replaced"):
        write_checkpoint(path, {}, "peft", adapter_config=data.adapter_config)


def test_names_of_the_fork_convert_both_ways(adapters):
    state = read_adapter(adapters / "adapter_000")
    fork = to_fork_names(state)
    assert is_fork_adapter(fork) and not is_fork_adapter(state)
    name = next(name for name in fork if name.endswith("q_proj.weight_m_wdecomp.weight"))
    assert fork[name].shape == (16, 1)
    back = to_peft_names(fork)
    assert list(back) == list(state) and all(torch.equal(back[name], state[name]) for name in state)
    assert to_peft_names(state) == state
    config = read_adapter_config(adapters / "adapter_000")
    fork_config = to_fork_config(config)
    assert fork_config["peft_type"] == "DORA" and fork_config["r"] == 2
    again = to_peft_config(fork_config)
    assert again["peft_type"] == "LORA" and again["use_dora"] and again["target_modules"] == config["target_modules"]


def test_folders_of_the_fork_are_checkpoints_too(adapters, tmp_path):
    written = convert(adapters, tmp_path / "fork", "fork")
    assert [path.name for path in written] == ["adapter_000", "adapter_001", "adapter_002"]
    assert (written[0] / "adapter_model.bin").is_file()
    data = build_data(DataSection(checkpoints=str(tmp_path / "fork"), dim_per_token=32))
    assert any(name.endswith("weight_m_wdecomp.weight") for name in data.codec.tensor_names)
    generated = write_checkpoint(tmp_path / "new", data.codec.decode(data.tokens.network(1)), "peft",
                                 adapter_config=data.adapter_config)  # fmt: skip
    assert torch.allclose(logits(generated), logits(adapters / "adapter_001"), atol=1e-5)
    (back,) = convert(written[1], tmp_path / "back", "peft")
    assert torch.equal(logits(back), logits(adapters / "adapter_001"))


def test_lora_without_magnitudes_has_no_form_in_the_fork(tmp_path):
    save_adapters(tmp_path / "lora", count=1, dora=False)
    assert build_data(DataSection(checkpoints=str(tmp_path / "lora"), dim_per_token=16)).adapter_config["r"] == 2
    with pytest.raises(CheckpointError, match="only DoRA adapters convert"):
        convert(tmp_path / "lora", tmp_path / "fork", "fork")


def test_adapters_of_different_kinds_are_named(tmp_path):
    save_adapters(tmp_path / "mixed", count=2)
    path = tmp_path / "mixed" / "adapter_001" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 9}))
    with pytest.raises(DataError, match=r"adapter_001.*lora_alpha=9, but .*adapter_000.* has 4"):
        build_data(DataSection(checkpoints=str(tmp_path / "mixed"), dim_per_token=16))
    torch.save({"w": torch.ones(3)}, tmp_path / "mixed" / "plain.pth")
    with pytest.raises(DataError, match=r"adapter_000 is an adapter and .*plain\.pth is not"):
        build_data(DataSection(checkpoints=str(tmp_path / "mixed"), dim_per_token=16))


def test_plain_networks_cannot_be_written_as_adapters(tmp_path):
    with pytest.raises(CheckpointError, match="format=peft needs the options of the adapter"):
        write_checkpoint(tmp_path / "x", {"w": torch.ones(2)}, "peft")
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="neither adapter_model"):
        read_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="no mapping"):
        read_adapter_config(tmp_path)
