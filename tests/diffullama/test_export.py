"""The export command: every source to every format, bit for bit where nothing is merged."""

import json
import re
import sys

import pytest
import torch

from common.seeding import generator
from diffullama.convert import read_file, read_folder
from diffullama.export import main
from diffullama.loading import load_model
from diffullama.lora import PeftConfig, apply_lora, save_adapter
from diffullama.model import DiffusionLM
from diffullama.saving import save_model
from diffullama.special_tokens import SpecialTokens
from tests.diffullama.hub_folders import assert_same_state, tiny_hf, tiny_tokenizer, write_hub_folder, write_shards

MASK = 5
X = torch.tensor([[0, 7, 5, 9, 5, 5, 11, 30]])


@pytest.fixture
def export(monkeypatch, tmp_path, capfd):
    """Runs the command line with options; returns the exit code and what it wrote to stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["export", *options])
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
        return code, capfd.readouterr().err

    return run


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_hub_to_wrapper_to_hub_is_bit_for_bit_in_the_stored_dtype(export, tmp_path, family):
    hf = tiny_hf(family).to(torch.bfloat16)
    write_hub_folder(tmp_path / "parent", hf)
    assert export("model_path=parent", "output=wrapper", "to=reference", f"mask_token_id={MASK}") == (0, "")
    wrapper = read_file(tmp_path / "wrapper" / "model.safetensors")
    assert {"embed_tokens.weight", next(key for key in wrapper if key.startswith("denoise_model."))} <= set(wrapper)
    assert export("model_path=wrapper", "output=back")[0] == 0
    assert_same_state(load_model(tmp_path / "back", dtype="auto").model.hf.state_dict(), hf.state_dict())
    metadata = json.loads((tmp_path / "back" / "quintet.json").read_text())
    assert (metadata["mask_token_id"], metadata["diffusion_shift"], metadata["base_model"]) == (MASK, True, "parent")
    assert "git_revision" in metadata and "mask token id | 5" in (tmp_path / "back" / "README.md").read_text()


def test_shards_become_one_file(export, tmp_path):
    hf = tiny_hf("llama")
    write_shards(write_hub_folder(tmp_path / "shards", hf), hf.state_dict())
    assert export("model_path=shards", "output=whole", f"mask_token_id={MASK}")[0] == 0
    assert_same_state(read_folder(tmp_path / "whole"), hf.state_dict())
    assert (tmp_path / "whole" / "model.safetensors").is_file()


def test_a_plain_model_gets_a_mask_token_as_the_start_of_an_adaptation(export, tmp_path):
    write_hub_folder(tmp_path / "parent", tiny_hf("qwen3"))
    assert export("model_path=parent", "output=start", "add_mask_token=true")[0] == 0
    start = load_model(tmp_path / "start")
    assert start.tokenizer.decode([start.special.mask_id]) == "<|mask|>"
    code, error = export("model_path=start", "output=again", "add_mask_token=true")
    assert code == 2 and f"give mask_token_id={start.special.mask_id}" in error


def test_what_was_trained_autoregressively_stays_so_unless_a_mask_is_named(export, tmp_path):
    hf = tiny_hf("llama")
    special = SpecialTokens(mask_id=MASK, bos_id=0, eos_id=0, pad_id=0)
    save_model(tmp_path / "parent", DiffusionLM(hf, None).eval(), tiny_tokenizer(), special)
    assert export("model_path=parent", "output=same")[0] == 0
    assert "is_causal" not in json.loads((tmp_path / "same" / "config.json").read_text())
    assert json.loads((tmp_path / "same" / "quintet.json").read_text())["is_causal"] is True
    assert export("model_path=parent", "output=diffusion", f"mask_token_id={MASK}")[0] == 0
    assert json.loads((tmp_path / "diffusion" / "config.json").read_text())["is_causal"] is False
    for folder in ("same", "diffusion"):
        assert_same_state(read_folder(tmp_path / folder), read_folder(tmp_path / "parent"))


def test_adapters_are_merged_or_exported_alone(export, tmp_path):
    hf = tiny_hf("llama")
    write_hub_folder(tmp_path / "base", hf)
    model = apply_lora(DiffusionLM(hf, MASK).eval(), PeftConfig(kind="lora", r=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=generator(0, "adapter"))
        expected = model(X)
    save_adapter(tmp_path / "released", model, "reference", base_model="output/not-here")
    code, error = export("model_path=released", "output=merged")
    assert code == 2 and "give base=" in error
    options = ("base=base", f"mask_token_id={MASK}")
    assert export("model_path=released", "output=merged", *options)[0] == 0
    with torch.no_grad():
        assert torch.allclose(load_model(tmp_path / "merged").model(X), expected, atol=1e-5)
    assert export("model_path=released", "output=ours", "to=adapter", *options)[0] == 0
    assert export("model_path=ours", "output=theirs", "to=adapter", "naming=reference")[0] == 0  # mask and base stored
    assert_same_state(
        read_file(tmp_path / "theirs" / "adapter_model.safetensors"),
        read_file(tmp_path / "released" / "adapter_model.safetensors"),
    )
    code, error = export("model_path=base", "output=x", "to=adapter", f"mask_token_id={MASK}")
    assert code == 2 and "has no adapter" in error


@pytest.mark.parametrize(
    "options, message",
    [
        (["model_path=nowhere"], "nowhere is no local folder|nowhere does not exist"),
        (["model_path=parent"], "mask_token_id=..."),
        (["model_path=parent", "mask_token_id=999"], "mask_token_id=999 is outside"),
        (["model_path=parent", "mask_token_id=0"], "eos token too"),
        (["model_path=parent", "mask_token_id=3", "add_mask_token=true"], "contradict"),
        (["model_path=parent", "dtype=int3"], "dtype=int3"),
        (["model_path=parent", "naming=reference"], "belongs to to=adapter"),
        (["model_path=parent", "to=wrapper"], "to='wrapper'"),
        (["model_path=parent", "mask_tokn_id=3"], "mask_tokn_id.*mask_token_id"),
        (["model_path=parent", "output=parent", "mask_token_id=3"], "overwrite=true"),
        ([], "model_path has no value"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(export, tmp_path, options, message):
    write_hub_folder(tmp_path / "parent", tiny_hf("gpt2"))
    code, error = export("output=out", *options)
    assert code == 2
    assert re.search(message, error), error
    assert "Traceback" not in error and not (tmp_path / "out").exists()
