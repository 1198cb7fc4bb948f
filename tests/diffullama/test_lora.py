"""Adapters: on GPT-2's Conv1D too, a start that changes nothing, both namings, nothing ignored, merging exact."""

import json
import logging

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from common.conversion import from_config
from common.errors import CheckpointError, ConfigError
from common.seeding import generator
from diffullama.attention import sees_the_future
from diffullama.convert import read_file
from diffullama.lora import (
    PeftConfig,
    apply_lora,
    has_adapter,
    load_adapter,
    merge,
    save_adapter,
)
from diffullama.model import DiffusionLM
from tests.diffullama.hub_folders import assert_same_state, tiny_hf

MASK = 5
X = torch.tensor([[0, 7, 5, 9, 5, 5, 11, 30], [0, 5, 5, 5, 8, 2, 5, 5]])
WHERE = (X == MASK) & (torch.arange(8) > 0)
LORA = PeftConfig(kind="lora", r=2, alpha=4)


def tiny(family: str = "gpt2", **options) -> DiffusionLM:
    return DiffusionLM(tiny_hf(family, **options), MASK).eval()


def randomised(model: DiffusionLM, seed: int = 0) -> DiffusionLM:
    """Trained tensors made random, so that an adapter that is not applied shows."""
    rng = generator(seed, "adapter")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.3)
    return model


def trained_names(model: DiffusionLM) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---------------------------------------------------------------- building


@pytest.mark.parametrize(
    "family, layers", [("gpt2", {"c_attn", "c_proj", "c_fc"}), ("qwen3", {"q_proj", "k_proj", "v_proj", "o_proj"})]
)
def test_all_linear_layers_get_adapters_that_change_nothing_at_first(family, layers):
    plain, model = tiny(family), apply_lora(tiny(family), LORA)
    with torch.no_grad():
        assert torch.equal(model(X), plain(X))
    names = trained_names(model)
    assert names and all(".lora_" in name for name in names)
    assert layers <= {name.split(".lora_")[0].rpartition(".")[2] for name in names}
    assert not any("lm_head" in name for name in names)
    assert sum(".lora_A" in name for name in names) == (4 if family == "gpt2" else 7) * 2
    assert model.vocab_size == plain.vocab_size and model.mask_id == MASK and len(model.blocks) == 2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_only_the_adapters_learn_and_they_do(family):
    model = apply_lora(tiny(family), LORA)
    loss, _ = model(X, X, WHERE, torch.ones(len(X)))
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert {name for name, grad in grads.items() if grad is not None} == trained_names(model)
    assert all(grads[name].abs().sum() > 0 for name in trained_names(model) if ".lora_B" in name)


def test_information_flows_both_ways_through_adapters():
    for family in ("gpt2", "llama"):
        model = randomised(apply_lora(tiny(family), LORA))
        for mode in (True, False):
            model.train(mode)
            assert sees_the_future(model) and not sees_the_future(model, causal=True)


def test_no_adapters_is_the_same_model():
    model = tiny()
    assert apply_lora(model, PeftConfig()) is model and not has_adapter(model) and merge(model) is model


@pytest.mark.parametrize(
    "options, message",
    [
        ({"targets": ["q_proj"]}, "q_proj matches no linear layer of GPT2LMHeadModel; it has c_attn, c_fc, c_proj"),
        ({"targets": ["lm_head"]}, "holds the head"),
        ({"modules_to_save": ["norm"]}, "norm matches no module of GPT2LMHeadModel"),
    ],
)
def test_names_that_match_no_module_are_an_error(options, message):
    with pytest.raises(ConfigError, match=message):
        apply_lora(tiny(), PeftConfig(kind="lora", **options))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "peft.r=0"),
        ({"alpha": 0}, "peft.alpha=0"),
        ({"dropout": 1.0}, "peft.dropout=1.0"),
        ({"targets": "q_proj"}, "must be all or a list"),
        ({"targets": []}, "peft.targets is empty"),
        ({"kind": "prefix"}, "peft.kind"),
        ({"train_mask_row": True, "modules_to_save": ["wte"]}, "both train the mask's row"),
    ],
)
def test_impossible_options_are_refused_before_a_model_is_there(options, message):
    with pytest.raises(ConfigError, match=message):
        from_config(PeftConfig, {"kind": "lora", **options}, "peft")


def test_adapters_twice_are_refused():
    with pytest.raises(ConfigError, match="adapters already"):
        apply_lora(apply_lora(tiny(), LORA), LORA)


# ---------------------------------------------------------------- the mask's row and whole modules


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_mask_s_row_is_trained_with_as_many_numbers_as_it_has(family):
    model = apply_lora(tiny(family), PeftConfig(kind="lora", r=2, train_mask_row=True))
    rows = [parameter for name, parameter in model.named_parameters() if "trainable_tokens" in name]
    assert [tuple(row.shape) for row in rows if row.requires_grad] == [(1, 16)]
    loss, _ = model(X, X, WHERE, torch.ones(len(X)))
    loss.backward()
    assert rows[0].grad.abs().sum() > 0
    before = tiny(family)
    with torch.no_grad():
        rows[0] += 1.0
        embedding = model.hf.get_input_embeddings()(torch.arange(8))
        change = embedding - before.hf.get_input_embeddings()(torch.arange(8))
        assert torch.allclose(change[MASK], torch.ones(16), atol=1e-6)
        assert change[torch.arange(8) != MASK].abs().amax() == 0
        merged = merge(model)
        assert torch.allclose(merged.denoise(X, WHERE), apply_row(before, 1.0).denoise(X, WHERE), atol=1e-5)


def apply_row(model: DiffusionLM, change: float) -> DiffusionLM:
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[MASK] += change
    return model


def test_an_embedding_saved_whole_stays_tied_with_the_head_and_says_so(caplog):
    config = PeftConfig(kind="lora", r=2, modules_to_save=["embed_tokens"])
    with caplog.at_level(logging.WARNING):
        model = randomised(apply_lora(tiny("gpt2"), config))
    assert "ties embedding and head" in caplog.text
    hf = model.hf
    assert hf.get_input_embeddings().weight is hf.get_output_embeddings().weight
    assert any("wte.modules_to_save" in name for name in trained_names(model))
    with torch.no_grad():
        expected = model(X)
        merged = merge(model)
        assert torch.allclose(merged(X), expected, atol=1e-5)
    assert merged.hf.lm_head.weight is merged.hf.transformer.wte.weight
    caplog.clear()
    apply_lora(tiny("llama"), config)
    assert "ties" not in caplog.text


# ---------------------------------------------------------------- merging, saving, loading


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("variant", [{}, {"rslora": True}, {"dora": True}])
def test_a_merged_adapter_computes_what_the_unmerged_one_did(family, variant):
    model = randomised(apply_lora(tiny(family), PeftConfig(kind="lora", r=2, alpha=4, **variant)))
    with torch.no_grad():
        expected = model(X)
        assert not torch.allclose(expected, tiny(family)(X), atol=1e-2)
        merged = merge(model)
        assert torch.allclose(merged(X), expected, atol=1e-5)
    assert not has_adapter(merged) and sorted(merged.state_dict()) == sorted(tiny(family).state_dict())


CASES = [
    ("gpt2", {}),
    ("gpt2", {"modules_to_save": ["wte"]}),
    ("llama", {}),
    ("llama", {"modules_to_save": ["embed_tokens"]}),
    ("llama", {"targets": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}),
]


@pytest.mark.parametrize("naming", ["peft", "reference"])
@pytest.mark.parametrize("family, options", CASES)
def test_adapters_survive_saving_and_loading_in_either_naming(tmp_path, family, options, naming):
    model = randomised(apply_lora(tiny(family), PeftConfig(kind="lora", r=2, **options)))
    save_adapter(tmp_path / "first", model, naming, base_model="some/base")
    keys = read_file(tmp_path / "first" / "adapter_model.safetensors")
    assert any("denoise_model" in key for key in keys) == (naming == "reference")
    loaded = load_adapter(tiny(family), tmp_path / "first")
    with torch.no_grad():
        assert torch.equal(loaded(X), model(X))
    other = "peft" if naming == "reference" else "reference"
    save_adapter(tmp_path / "second", loaded, other)
    save_adapter(tmp_path / "third", load_adapter(tiny(family), tmp_path / "second"), naming)
    assert_same_state(read_file(tmp_path / "third" / "adapter_model.safetensors"), keys)
    assert (
        json.loads((tmp_path / "first" / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    )


def test_the_released_naming_is_that_of_the_wrapper(tmp_path):
    """Module names of the published adapter: denoise_model for the backbone, embed_tokens beside it."""
    config = PeftConfig(kind="lora", r=2, targets=["q_proj"], modules_to_save=["embed_tokens"])
    save_adapter(tmp_path, apply_lora(tiny("llama"), config), "reference")
    assert set(read_file(tmp_path / "adapter_model.safetensors")) == {
        "base_model.model.embed_tokens.weight",
        *(
            f"base_model.model.denoise_model.layers.{layer}.self_attn.q_proj.lora_{side}.weight"
            for layer in range(2)
            for side in "AB"
        ),
    }
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["embed_tokens"]


def test_an_adapter_in_peft_s_naming_loads_with_peft_alone(tmp_path):
    for family, options in (("gpt2", {}), ("gpt2", {"train_mask_row": True}), ("llama", {"modules_to_save": ["wte"]})):
        folder = tmp_path / f"{family}{len(options)}"
        model = randomised(apply_lora(tiny(family), PeftConfig(kind="lora", r=2, **options)))
        save_adapter(folder, model)
        theirs = PeftModel.from_pretrained(tiny_hf(family), str(folder)).eval()
        with torch.no_grad():
            assert torch.allclose(theirs(input_ids=X, is_causal=False, use_cache=False).logits, model(X), atol=1e-5)


def test_an_embedding_that_the_configuration_does_not_mention_is_loaded(tmp_path):
    """As an adapter saved by peft after a vocabulary was resized; unmentioned keys would be dropped silently."""
    config = PeftConfig(kind="lora", r=2, targets=["q_proj"], modules_to_save=["embed_tokens"])
    model = randomised(apply_lora(tiny("llama"), config))
    save_adapter(tmp_path, model, "reference")
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**described, "modules_to_save": None, "new_option": 1}))
    with torch.no_grad():
        assert torch.equal(load_adapter(tiny("llama"), tmp_path)(X), model(X))


def test_an_adapter_that_does_not_fit_names_every_tensor(tmp_path):
    save_adapter(tmp_path, apply_lora(tiny("llama"), PeftConfig(kind="lora", r=2, targets=["q_proj"])))
    with pytest.raises(ConfigError, match="q_proj matches no linear layer of GPT2LMHeadModel"):
        load_adapter(tiny("gpt2"), tmp_path)
    state = read_file(tmp_path / "adapter_model.safetensors")
    first, *rest = sorted(state)
    state["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = state.pop(first)
    state[rest[0]] = torch.zeros(3, 3)
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_adapter(tiny("llama"), tmp_path)
    for part in ("3 differences", f"missing {first}", "unexpected base_model.model.model.layers.7", "shape (3, 3)"):
        assert part in str(error.value)


def test_damaged_or_foreign_adapter_folders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no adapter folder"):
        load_adapter(tiny(), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    with pytest.raises(CheckpointError, match="PREFIX_TUNING"):
        load_adapter(tiny(), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"')
    with pytest.raises(CheckpointError, match="no readable JSON"):
        load_adapter(tiny(), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["c_attn"]}')
    with pytest.raises(CheckpointError, match="neither adapter_model.safetensors nor"):
        load_adapter(tiny(), tmp_path)
    with pytest.raises(ConfigError, match="no adapter to save"):
        save_adapter(tmp_path / "out", tiny())


def test_a_trained_mask_row_has_no_released_naming(tmp_path):
    model = apply_lora(tiny(), PeftConfig(kind="lora", r=2, train_mask_row=True))
    with pytest.raises(ConfigError, match="naming=peft"):
        save_adapter(tmp_path, model, "reference")
    save_adapter(tmp_path, randomised(model))
    with torch.no_grad():
        assert torch.equal(load_adapter(tiny(), tmp_path)(X), model(X))
