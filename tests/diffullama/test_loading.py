"""Every source of a model loads into the right tensors, whatever does not fit is named, and nothing gets lost."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.checkpoint import write_checkpoint
from common.errors import CheckpointError, ConfigError, DataError
from common.evaluation.masked_model import load_masked_model
from common.parallel import start
from common.seeding import generator
from diffullama.attention import sees_the_future
from diffullama.loading import load_model, resolve_dtype, save_model, tokenizer_folder, write_architecture
from diffullama.lora import PeftConfig, apply_lora, save_adapter
from diffullama.model import DiffusionLM
from diffullama.saving import quiet_transformers
from diffullama.special_tokens import SpecialTokens, add_mask_token
from tests.diffullama.hub_folders import (
    FAMILIES,
    VOCAB,
    assert_same_state,
    edit_json,
    tiny_hf,
    tiny_tokenizer,
    write_hub_folder,
)

MASK = 5
X = torch.tensor([[0, 7, 5, 9, 5, 5, 11, 30]])


def adapted(family="gpt2", **options) -> tuple[DiffusionLM, SpecialTokens]:
    hf = tiny_hf(family, **options)
    return DiffusionLM(hf, MASK).eval(), SpecialTokens(MASK, 0, 0, 0, 12)


# ---------------------------------------------------------------- plain models of the hub


@pytest.mark.parametrize("family", FAMILIES)
def test_any_causal_language_model_loads_saves_and_loads_as_the_same_diffusion_model(family, tmp_path):
    hf = tiny_hf(family)
    write_hub_folder(tmp_path / "parent", hf)
    loaded = load_model(tmp_path / "parent", mask_token_id=MASK)
    assert_same_state(loaded.model.hf.state_dict(), hf.state_dict())
    assert not loaded.model.training and loaded.model.shift and loaded.model.mask_id == MASK
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("the cat")) == "the cat"
    assert sees_the_future(loaded.model, length=12) and not sees_the_future(loaded.model, length=12, causal=True)
    save_model(tmp_path / "out", loaded.model, loaded.tokenizer, loaded.special, metadata={"base_model": "some/parent"})
    again = load_model(tmp_path / "out")  # the mask is stored
    assert_same_state(again.model.hf.state_dict(), hf.state_dict())
    assert again.special == loaded.special
    with torch.no_grad():
        assert torch.equal(again.model(X), loaded.model(X))
    with quiet_transformers():
        plain = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), local_files_only=True)
    assert (plain.config.mask_token_id, plain.config.diffusion_shift, plain.config.is_causal) == (MASK, True, False)
    with torch.no_grad():
        assert torch.allclose(plain(input_ids=X).logits, loaded.model(X), atol=1e-6)  # full attention by itself
    assert "base_model: some/parent" in (tmp_path / "out" / "README.md").read_text()


def test_parameters_are_float32_unless_asked_for_as_stored(tmp_path):
    hf = tiny_hf("gpt2").to(torch.bfloat16)
    folder = write_hub_folder(tmp_path, hf)
    assert load_model(folder, mask_token_id=MASK).model.hf.dtype == torch.float32
    stored = load_model(folder, mask_token_id=MASK, dtype="auto")
    assert_same_state(stored.model.hf.state_dict(), hf.state_dict())
    assert load_model(folder, mask_token_id=MASK, dtype="fp16").model.hf.dtype == torch.float16
    with pytest.raises(ConfigError, match="dtype=int3 is not known"):
        resolve_dtype("int3")


# ---------------------------------------------------------------- the released layouts


def wrapper_state(model: DiffusionLM) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.reference_state_dict().items()}


def write_released_tokenizer(folder, mask_token):
    """Files of the older kind, as the released gpt2-medium model has them: the mask stands in added_tokens.json."""
    raw = json.loads(tiny_tokenizer().tokenizer.backend_tokenizer.to_str())["model"]
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    contents = {
        "vocab.json": raw["vocab"],
        "added_tokens.json": {mask_token: len(raw["vocab"])},
        "special_tokens_map.json": {**ends, "mask_token": mask_token},
        "tokenizer_config.json": {**ends, "tokenizer_class": "GPT2Tokenizer", "model_max_length": 64},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in raw["merges"])]) + "\n")


def test_the_released_medium_model_has_a_row_more_than_its_configuration(tmp_path):
    """Wrapper keys, one copy of the tied matrix, the mask known to the tokenizer only."""
    tokenizer, hf = tiny_tokenizer(), tiny_hf("gpt2", vocab_size=tiny_tokenizer().vocab_size)
    mask_id = add_mask_token(hf, tokenizer, generator(0, "mask row"))
    model = DiffusionLM(hf, mask_id)
    save_model(tmp_path / "out", model, None, SpecialTokens(mask_id, 0, 0, 0), layout="reference")
    write_released_tokenizer(tmp_path / "out", "[¨M¨]")
    (tmp_path / "out" / "quintet.json").unlink()
    edit_json(
        tmp_path / "out" / "config.json",
        vocab_size=mask_id,
        mask_token_id=None,
        diffusion_shift=None,
        is_causal=None,
        special_tokens=None,
        architectures=["DiffusionModel"],
    )
    loaded = load_model(tmp_path / "out")
    assert loaded.model.vocab_size == mask_id + 1 and loaded.special.mask_id == mask_id and loaded.model.shift
    assert_same_state(wrapper_state(loaded.model), wrapper_state(model))
    assert loaded.tokenizer.vocab_size == mask_id + 1
    assert loaded.tokenizer.encode("the cat[¨M¨]") == [*tiny_tokenizer().encode("the cat"), mask_id]


# ---------------------------------------------------------------- special tokens


@pytest.mark.parametrize(
    "mask_id, message",
    [(VOCAB, "outside the model's 280 embedding rows"), (-1, "outside"), (0, "is the eos token too")],
)
def test_an_impossible_mask_is_refused_before_anything_is_built(tmp_path, mask_id, message):
    folder = write_hub_folder(tmp_path, tiny_hf("llama"))
    with pytest.raises(ConfigError, match=message):
        load_model(folder, mask_token_id=mask_id)


def test_a_model_without_a_mask_asks_for_one_unless_it_is_a_causal_parent(tmp_path):
    folder = write_hub_folder(tmp_path, tiny_hf("mistral"))
    with pytest.raises(ConfigError, match="mask_token_id=..., or add_mask_token=true"):
        load_model(folder)
    parent = load_model(folder, causal_parent=True)
    assert parent.special.mask_id is None and parent.model.config.sliding_window == 3
    with torch.no_grad(), quiet_transformers():
        expected = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True)(input_ids=X).logits
        assert torch.equal(parent.model(X, causal=True), expected)


# ---------------------------------------------------------------- runs


def write_run(run_dir, model, special, config, *, averaged=None):
    """As the trainer leaves it: a checkpoint of the whole module, the architecture beside it."""
    from common.checkpoint import save_weights

    write_architecture(run_dir, model, special, {"max_length": 32})
    tiny_tokenizer().save(run_dir / "tokenizer")

    def stage(folder):
        save_weights(folder / "model.safetensors", model.state_dict())
        if averaged is not None:
            save_weights(folder / "ema.safetensors", averaged)

    with start() as parallel:
        write_checkpoint(run_dir, 3, [stage], config=config, parallel=parallel)
    return run_dir


def test_a_run_loads_with_its_moving_average(tmp_path):
    model, special = adapted("qwen3")
    averaged = {key: value + 1 for key, value in model.state_dict().items()}
    averaged["lm.lm_head.weight"] = averaged["lm.model.embed_tokens.weight"]
    run = write_run(tmp_path / "run", model, special, {"seed": 4}, averaged=averaged)
    loaded = load_model(run)
    assert_same_state(loaded.model.state_dict(), averaged)
    assert loaded.special == special and loaded.length == 32 and loaded.config["training"] == {"seed": 4}
    assert loaded.tokenizer.encode("the cat")
    assert tokenizer_folder(run) == tokenizer_folder(run / "checkpoints" / "step_00000003") == str(run / "tokenizer")
    assert_same_state(load_model(run, ema=False).model.state_dict(), model.state_dict())
    assert_same_state(load_model(run / "checkpoints" / "step_00000003").model.state_dict(), averaged)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_run_with_adapters_loads_with_them(tmp_path, family):
    model, special = adapted(family)
    config = PeftConfig(kind="lora", r=2, train_mask_row=True)
    model = apply_lora(model, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=generator(0, "adapter"))
    run = write_run(tmp_path / "run", model, special, {"peft": {"kind": "lora", "r": 2, "train_mask_row": True}})
    loaded = load_model(run)
    assert_same_state(loaded.model.state_dict(), model.state_dict())
    with torch.no_grad():
        expected = model(X)
        assert torch.equal(loaded.model(X), expected)
    save_model(tmp_path / "merged", loaded.model, loaded.tokenizer, loaded.special)
    with torch.no_grad():
        assert torch.allclose(load_model(tmp_path / "merged").model(X), expected, atol=1e-5)
        assert torch.equal(loaded.model(X), expected)  # saving merged a copy


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("naming", ["peft", "reference"])
def test_an_adapter_folder_loads_with_its_base_model(tmp_path, naming):
    hf = tiny_hf("llama")
    write_hub_folder(tmp_path / "base", hf)
    model = apply_lora(DiffusionLM(hf, MASK).eval(), PeftConfig(kind="lora", r=2, modules_to_save=["embed_tokens"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=generator(0, "adapter"))
    save_adapter(tmp_path / "adapter", model, naming, base_model=str(tmp_path / "base"))
    loaded = load_model(tmp_path / "adapter", mask_token_id=MASK)
    with torch.no_grad():
        assert torch.equal(loaded.model(X), model(X))
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="give base="):
        load_model(tmp_path / "adapter", mask_token_id=MASK)
    again = load_model(tmp_path / "adapter", mask_token_id=MASK, base=tmp_path / "moved")
    assert_same_state(again.model.state_dict(), loaded.model.state_dict())


# ---------------------------------------------------------------- what cannot be loaded


def test_folders_without_a_model_say_what_they_hold(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no model.*it has nothing"):
        load_model(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    folder = write_hub_folder(tmp_path / "model", tiny_hf("gpt2"))
    with pytest.raises(CheckpointError, match="is a file"):
        load_model(folder / "model.safetensors")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="no usable configuration"):
        load_model(folder, mask_token_id=MASK)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        load_model(folder, mask_token_id=MASK)


def test_a_hub_name_offline_says_how_to_use_a_local_folder():
    with pytest.raises(CheckpointError, match="diffusionfamily/diffugpt-s is no local folder.*that folder's path"):
        load_model("diffusionfamily/diffugpt-s")


def test_a_model_without_a_tokenizer_loads_but_cannot_be_evaluated(tmp_path, caplog):
    folder = write_hub_folder(tmp_path, tiny_hf("gpt2"), tokenizer=False)
    loaded = load_model(folder, mask_token_id=MASK)
    assert loaded.tokenizer is None and "tokenizer=" in caplog.text
    with pytest.raises(DataError, match="tokenizer="):
        loaded.require_tokenizer()
    tiny_tokenizer().save(tmp_path / "tokenizer")
    assert load_model(folder, mask_token_id=MASK, tokenizer=tmp_path / "tokenizer").tokenizer is not None


def test_attention_backends_that_are_missing_are_named(tmp_path):
    folder = write_hub_folder(tmp_path, tiny_hf("llama"))
    with pytest.raises(ConfigError, match="attn_implementation=flash_attention_2 cannot be used.*use sdpa"):
        load_model(folder, mask_token_id=MASK, attn_implementation="flash_attention_2")
    assert (
        load_model(folder, mask_token_id=MASK, attn_implementation="eager").model.config._attn_implementation == "eager"
    )


def test_evaluators_find_the_loader_by_the_package_s_name(tmp_path):
    model, special = adapted("gpt2")
    save_model(tmp_path / "out", model, tiny_tokenizer(), special)
    found = load_masked_model("diffullama", str(tmp_path / "out"), "cpu", length=16)
    assert (found.mask_id, found.length, found.tokenizer.eos_id) == (MASK, 16, 0)
    where = torch.zeros_like(X, dtype=torch.bool)
    where[0, 2] = True
    with torch.no_grad():
        assert torch.equal(found.denoise(X, where), model.denoise(X, where))
    with pytest.raises(ConfigError, match="widht=3 is no option"):
        load_masked_model("diffullama", str(tmp_path / "out"), "cpu", widht=3)
