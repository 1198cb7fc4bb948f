"""The released layout: every size is read off a file, copies are verified and dropped, ours are written alike."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.errors import CheckpointError
from rpg.codec import TokenCodec
from rpg.loading import build_empty, load_generator, load_state
from rpg.model_config import GeneratorConfig
from rpg.noise_schedule import linear_tables
from rpg.released import ALIASES, NET, STATE_KEY, add_aliases, drop_aliases, read_released, read_sizes
from rpg.saving import save_generator, save_reference
from rpg.structure_cache import read_structure_cache
from tests.rpg.tiny_generator import TinyNet, networks, tiny_facts, tiny_generator

CASES = ("rpg_loss_forward_once", "rpg_loss_all_tokens", "rpg_class_condition", "mse_model")


def released_state(listing: list, steps: int) -> dict[str, Tensor]:
    """Random tensors of a reference model's names and shapes, with its tables, its copies sharing storage."""
    tables = linear_tables(steps=steps)
    known = {
        "diffusion_trainer.beta_t": tables.beta_T, "diffusion_trainer.signal_rate": tables.signal_rate_T,
        "diffusion_trainer.noise_rate": tables.noise_rate_T, "diffusion_sampler.beta_t": tables.beta_T,
        "diffusion_sampler.coeff_1": tables.coeff_1_T, "diffusion_sampler.coeff_2": tables.coeff_2_T,
        "diffusion_sampler.posterior_variance": tables.posterior_variance_T,
    }  # fmt: skip
    rng, state = torch.Generator().manual_seed(0), {}
    for name, shape in listing:
        prefix = next((alias for alias in ALIASES if name.startswith(alias)), None)
        if prefix is not None:
            state[name] = state[NET + name.removeprefix(prefix)]
        elif name.removeprefix("criteria.") in known:
            state[name] = known[name.removeprefix("criteria.")]
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        else:
            state[name] = torch.rand(shape, generator=rng)
    return state


@pytest.fixture(params=CASES)
def case(request, golden_dir: Path) -> dict:
    content = json.loads((golden_dir / "rpg" / "cases.json").read_text())
    cases = content.get("cases", content)
    return cases[request.param] if isinstance(cases, dict) else next(c for c in cases if c["name"] == request.param)


def test_sizes_come_from_the_tensors_and_what_is_written_again_has_every_name(case: dict):
    steps = case["config"].get("T", 1000)
    state = released_state(case["state_dict"], steps)
    sizes = read_sizes(state, "file")
    config = GeneratorConfig(**sizes)
    theirs = case["config"]
    assert (config.d_model, config.d_state, config.num_layers) == (
        theirs["d_model"], theirs["d_state"], theirs["num_layers"],
    )  # fmt: skip
    assert config.num_states == theirs["num_permutation"]
    if config.head == "diffusion":
        assert list(config.channels) == theirs["layer_channels"]
        assert (config.kernel_size, config.diffusion_steps) == (theirs["kernel_size"], steps)
        assert config.beta == (1e-4, 0.02)
    model = build_empty(config)
    load_state(model, state, "file")
    again = add_aliases(model.state_dict(), beta=config.beta, steps=config.diffusion_steps)
    assert {name: tuple(value.shape) for name, value in again.items()} == {
        name: tuple(shape) for name, shape in case["state_dict"]
    }
    for name, value in again.items():
        assert torch.allclose(value.float(), state[name].float(), atol=1e-6), name


def test_a_copy_that_differs_is_refused_with_both_names():
    model, _ = tiny_generator()
    state = add_aliases(model.state_dict(), steps=50)
    damaged = f"{ALIASES[0]}condi_embedder.weight"
    state[damaged] = state[damaged] + 1
    with pytest.raises(CheckpointError, match=r"diffusion_trainer\.model\.condi_embedder.*criteria\.net\.condi"):
        drop_aliases(state, "file")
    del state["criteria.net.condi_embedder.weight"]
    with pytest.raises(CheckpointError, match="but not criteria.net.condi_embedder.weight"):
        drop_aliases(state, "file")


def reference_cache(path: Path, files: list[str]) -> None:
    """A ``structure.cache`` as the reference pickles it."""
    _, codec = tiny_generator()
    structure = {}
    for entry in codec.structure.entries:
        if entry.kind == "constant":
            structure[entry.name] = (torch.Size(entry.shape), entry.value, None)
        else:  # the reference knows no ties: a tied tensor is one more
            source = next(e for e in codec.structure.entries if e.name == (entry.alias_of or entry.name))
            scale = () if source.scale is None else (torch.tensor(source.scale),)
            numbers = (*scale, torch.tensor(source.mean), torch.tensor(source.std))
            structure[entry.name] = (torch.Size(entry.shape), *numbers)
    path.write_bytes(pickle.dumps({"structure": structure, "checkpoint_list": files}))


def test_a_released_class_conditional_generator_loads_with_its_structure_cache(tmp_path: Path):
    files = [f"/data/0001_acc0.9_class{task:04d}_vit.pth" for task in (5, 793, 793)]
    reference_cache(tmp_path / "structure.cache", files)
    codec = TokenCodec(read_structure_cache(tmp_path / "structure.cache").structure, 32)
    theirs, _ = tiny_generator(codec, num_states=3, condition="gated", condition_size=10, d_condition=16)
    path = save_reference(tmp_path / "generalization.pth", theirs)
    assert isinstance(torch.load(path, weights_only=True), dict)
    loaded = load_generator(path)
    assert replace(loaded.config, chunk_size=theirs.config.chunk_size) == theirs.config
    assert loaded.codec.num_tokens == codec.num_tokens
    assert loaded.facts.tasks == (5, 793)
    assert loaded.groups == ()  # the table is there, but training never read it
    for name, value in theirs.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name


def test_the_permutation_table_takes_the_size_of_the_file():
    larger, codec = tiny_generator(num_states=7, condition="gated", condition_size=10, d_condition=16)
    state = add_aliases(larger.state_dict(), steps=50)
    for own_states in (3, 0):
        model, _ = tiny_generator(codec, num_states=own_states, condition="gated", condition_size=10, d_condition=16)
        load_state(model, state, "file")
        assert model.config.num_states == 7
        assert torch.equal(model.to_permutation_state.weight, larger.to_permutation_state.weight)
        row = torch.tensor([6])
        bits = torch.ones(1, 10)
        assert torch.equal(model.prototypes(row, bits), larger.prototypes(row, bits))


def test_a_resume_file_and_wrapped_names_are_read(tmp_path: Path):
    model, _ = tiny_generator()
    wrapped = {f"module.{name}": value for name, value in add_aliases(model.state_dict(), steps=50).items()}
    torch.save({"model": wrapped, "optimizer": {}, "step": 3}, tmp_path / "cache.pth")
    state = drop_aliases(read_released(tmp_path / "cache.pth"))
    assert set(state) == set(model.state_dict())


def test_files_that_are_no_generators_are_named(tmp_path: Path):
    torch.save(networks()[0], tmp_path / "network.pth")
    with pytest.raises(CheckpointError, match=r"network\.pth is no generator: it lacks model\.pe"):
        read_released(tmp_path / "network.pth")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"a": TinyNet}))
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        read_released(tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_released(tmp_path / "missing.pth")
    model, _ = tiny_generator()
    save_reference(tmp_path / "alone.pth", model)
    with pytest.raises(CheckpointError, match=r"structure\.cache"):
        load_generator(tmp_path / "alone.pth")


def test_options_that_the_reference_lacks_are_not_written(tmp_path: Path):
    model, _ = tiny_generator(prediction="v", norm="group")
    with pytest.raises(CheckpointError, match="model.prediction=v, model.norm=group"):
        save_reference(tmp_path / "x.pth", model)


def test_a_file_with_a_ddim_table_is_read(tmp_path: Path):
    model, codec = tiny_generator(num_states=2)
    folder = save_generator(tmp_path / "ours", model, codec, tiny_facts(groups=("a", "b")))
    path = save_reference(tmp_path / "ddim.pth", model, sampler="ddim")
    state = torch.load(path, weights_only=True)
    assert "criteria.diffusion_sampler.alpha_t_bar" in state
    assert STATE_KEY in state
    loaded = load_generator(path, structure=folder / "codec")
    assert replace(loaded.config, chunk_size=model.config.chunk_size) == model.config  # a matter of speed
    assert loaded.groups == ("0", "1")
