"""What is saved comes back: every kind of generator, its codec and what is known of its data."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.errors import CheckpointError
from rpg.loading import load_generator, load_state
from rpg.sampling import SamplerConfig
from rpg.saving import save_generator
from tests.rpg.tiny_generator import DIM, networks, tiny_codec, tiny_facts, tiny_generator

VARIANTS = {
    "plain": {},
    "states": {"num_states": 3},
    "two widths": {"d_model": 16, "post_d_model": 32},
    "lstm": {"stack": "lstm"},
    "transformer": {"stack": "transformer", "num_heads": 2, "head_size": 8, "feedforward": 24},
    "released transformer": {
        "stack": "transformer", "num_heads": 2, "head_size": 8, "feedforward": 24, "attention": "released",
    },
    "gated mlp": {"stack": "gmlp"},
    "tokens at once": {"head": "mse"},
    "full condition": {"condition": "full", "condition_size": 10, "d_condition": 16},
    "gate by name": {"condition": "gated", "condition_size": 10, "d_condition": 16, "gate": ("head.*",)},
    "other norm": {"norm": "group", "prediction": "v", "min_snr_gamma": 5.0},
    "trained positions": {"trainable_positions": True, "positions": "1d"},
}  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_saved_generator_comes_back_bit_by_bit(options: dict, tmp_path: Path):
    model, codec = tiny_generator(**options)
    save_generator(tmp_path / "saved", model, codec, tiny_facts(), {"seed": 3, "step": 10})
    loaded = load_generator(tmp_path / "saved")
    assert loaded.config == model.config
    assert (loaded.metadata["seed"], loaded.metadata["step"]) == (3, 10)
    state = model.state_dict()
    assert list(loaded.model.state_dict()) == list(state)
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    condition = torch.eye(10)[:1] if model.config.condition != "none" else None
    which = torch.tensor([1]) if model.config.num_states else None
    # equal weights at other places in memory: other kernels, other rounding
    assert torch.allclose(
        loaded.model.prototypes(which, condition), model.prototypes(which, condition), rtol=1e-4, atol=1e-5
    )
    assert not loaded.model.training
    assert not any(value.requires_grad for value in loaded.model.parameters())
    if model.config.head == "diffusion":
        assert torch.equal(loaded.model.diffusion.abar_T, model.diffusion.abar_T)


@pytest.mark.parametrize("normalisation", ["layer", "residual"])
def test_the_codec_travels_with_the_generator(normalisation: str, tmp_path: Path):
    model, codec = tiny_generator(tiny_codec(normalisation))
    save_generator(tmp_path / "saved", model, codec, tiny_facts())
    loaded = load_generator(tmp_path / "saved")
    assert loaded.normalisation == normalisation
    state = networks()[1]
    tokens_LD = codec.encode(state)
    assert torch.equal(loaded.codec.encode(state), tokens_LD) or torch.allclose(
        loaded.codec.encode(state), tokens_LD, equal_nan=True
    )
    back = loaded.codec.decode(tokens_LD)
    assert list(back) == list(state)
    for name, value in back.items():
        assert torch.allclose(value.float(), state[name].float(), atol=1e-5), name


def test_facts_and_the_sampler_of_the_run_come_back(tmp_path: Path):
    model, codec = tiny_generator(num_states=2)
    facts = tiny_facts(groups=("seed0000", "seed0001"), tester={"kind": "python", "target": "a:B"}, tasks=(5, 6))
    sampler = SamplerConfig(steps=7, eta=0.5)
    metadata = {"sampling": {"kind": "trailing", "steps": 7, "eta": 0.5}}
    save_generator(tmp_path / "saved", model, codec, facts, metadata)
    loaded = load_generator(tmp_path / "saved" / "model.safetensors")
    assert loaded.facts == facts
    assert loaded.groups == facts.groups
    assert loaded.sampler == sampler


def test_the_digest_is_that_of_weights_and_codec(tmp_path: Path):
    model, codec = tiny_generator()
    digests = []
    for number, change in enumerate((0.0, 0.0, 1e-3)):
        state = {
            name: value + change if value.dtype == torch.float32 else value
            for name, value in model.state_dict().items()
        }
        save_generator(tmp_path / str(number), model, codec, tiny_facts(), state=state)
        digests.append(load_generator(tmp_path / str(number)).digest)
    other, residual = tiny_generator(tiny_codec("residual"))
    save_generator(tmp_path / "residual", other, residual, tiny_facts())
    digests.append(load_generator(tmp_path / "residual").digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_nothing_is_replaced_unless_asked_for(tmp_path: Path):
    model, codec = tiny_generator()
    save_generator(tmp_path / "saved", model, codec, tiny_facts())
    with pytest.raises(CheckpointError, match="overwrite=true"):
        save_generator(tmp_path / "saved", model, codec, tiny_facts())
    save_generator(tmp_path / "saved", model, codec, tiny_facts(tag="new"), overwrite=True)
    assert load_generator(tmp_path / "saved").facts.tag == "new"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="other files"):
        save_generator(tmp_path / "other", model, codec, tiny_facts(), overwrite=True)


def test_weights_of_another_generator_are_named(tmp_path: Path):
    model, _ = tiny_generator()
    other, _ = tiny_generator(num_layers=1)
    with pytest.raises(CheckpointError, match=r"model\.mamba_forward\.1\.\S+ is missing"):
        load_state(model, other.state_dict(), "file")
    narrow, _ = tiny_generator(d_state=4)
    with pytest.raises(CheckpointError, match=r"in_proj\.weight is \("):
        load_state(model, narrow.state_dict(), "file")


def test_places_without_a_generator_are_described(tmp_path: Path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_generator(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="it has nothing"):
        load_generator(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="let the run end"):
        load_generator(tmp_path / "run")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(CheckpointError, match="no generator file"):
        load_generator(tmp_path / "x.txt")


def test_a_damaged_description_is_named(tmp_path: Path):
    model, codec = tiny_generator()
    folder = save_generator(tmp_path / "saved", model, codec, tiny_facts())
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        load_generator(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_generator(folder)
    wrong = replace(model.config, num_tokens=model.config.num_tokens + 1)
    (folder / "config.json").write_text(json.dumps(described | {"model": vars(wrong)}))
    with pytest.raises(CheckpointError, match=f"{model.config.num_tokens + 1} tokens of {DIM}"):
        load_generator(folder)
