"""A network is a function of generator, seed and request: not of the others, the rows of a pass, or the processes."""

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.errors import CheckpointError, ConfigError
from common.parallel import Parallel
from rpg.generation import generate, network_seed
from rpg.loading import LoadedGenerator
from rpg.requests import Request, build_requests, task_conditions
from rpg.sampling import SamplerConfig
from tests.rpg.tiny_generator import TinyNet, tiny_facts, tiny_generator

FEW = SamplerConfig(steps=4)


def loaded_generator(**options) -> LoadedGenerator:
    model, codec = tiny_generator(**options)
    groups = tuple(f"seed{row:04d}" for row in range(model.config.num_states))
    return LoadedGenerator(model, codec, tiny_facts(groups=groups), {}, "0" * 64, "tiny")


@pytest.fixture(scope="module")
def loaded() -> LoadedGenerator:
    return loaded_generator(num_states=3)


def drawn(loaded: LoadedGenerator, requests: list[Request], sampler=FEW, **options) -> dict:
    options = {"seed": 0, **options}
    return {(request.label, request.index): state for request, state in generate(loaded, requests, sampler, **options)}


def assert_same(left: dict, right: dict) -> None:
    assert list(left) == list(right)
    for name, value in left.items():
        assert value.dtype == right[name].dtype
        assert torch.allclose(value.float(), right[name].float(), rtol=1e-4, atol=1e-5), name


def test_a_generated_network_loads_strictly_and_keeps_ties_and_constants(loaded):
    (state,) = drawn(loaded, [Request(0, 1)]).values()
    network = TinyNet()
    network.load_state_dict(state, strict=True)
    assert torch.equal(network.index, torch.arange(5))
    assert state["tied.weight"] is state["head.weight"]
    assert list(state) == list(network.state_dict())


def test_networks_do_not_depend_on_the_others_nor_on_the_rows_of_a_pass(loaded):
    requests = build_requests(None, 4, seed=0, groups=loaded.groups)
    together = drawn(loaded, requests)
    assert len(together) == 4
    for rows in (1, 16, 40):
        for key, state in drawn(loaded, requests[2:3], rows_per_pass=rows).items():
            assert_same(state, together[key])
    assert not torch.equal(together["", 0]["head.bias"], together["", 1]["head.bias"])


def test_little_memory_means_smaller_groups_and_the_same_networks(loaded, monkeypatch):
    requests = build_requests(None, 3, seed=0, groups=loaded.groups)
    whole = drawn(loaded, requests)
    monkeypatch.setattr("rpg.generation.TOKENS_IN_MEMORY", 1)
    parts = drawn(loaded, requests)
    for key, state in whole.items():
        assert_same(state, parts[key])


def test_the_seed_decides_the_noise_and_the_label_is_part_of_it():
    seeds = {network_seed(seed, Request(index, label=label)) for seed in (0, 1) for index in (0, 1) for label in "ab"}
    assert len(seeds) == 8
    assert network_seed(3, Request(5, state=1)) == network_seed(3, Request(5, state=2))


def test_the_state_decides_the_prototypes(loaded):
    first, second = (drawn(loaded, [Request(0, state)])["", 0] for state in (0, 1))
    assert not torch.allclose(first["head.bias"], second["head.bias"])


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "dpm_solver_sde", "heun"])
def test_every_sampler_gives_finite_networks(loaded, kind: str):
    (state,) = drawn(loaded, [Request(0, 0)], SamplerConfig(kind=kind, steps=4)).values()
    assert all(torch.isfinite(value.float()).all() for value in state.values())


def test_guidance_moves_away_from_the_unconditional_network():
    loaded = loaded_generator(condition="full", condition_size=10, d_condition=16)
    requests = build_requests(task_conditions([793]), 1, seed=0)
    plain, guided = (
        drawn(loaded, requests, replace(FEW, guidance=guidance))["class0793", 0] for guidance in (1.0, 2.0)
    )
    assert not torch.allclose(plain["head.bias"], guided["head.bias"])
    # 0: as if there were no condition
    noise = [Request(0, None, condition, "same") for condition in ((1.0,) * 10, (0.0,) * 10)]
    first, second = (drawn(loaded, [request], replace(FEW, guidance=0.0))["same", 0] for request in noise)
    assert_same(first, second)


def test_prototypes_that_are_the_tokens_need_no_sampler():
    loaded = loaded_generator(head="mse", num_states=2)
    states = drawn(loaded, [Request(0, 0), Request(1, 0), Request(2, 1)])
    assert_same(states["", 0], states["", 1])
    assert not torch.allclose(states["", 0]["head.bias"], states["", 2]["head.bias"])


@pytest.mark.parametrize(
    "request_, sampler, message",
    [
        (Request(0, 3), FEW, "permutation state 3.*has 3"),
        (Request(0, 0, (1.0,) * 10), FEW, "condition of 10 numbers, but the generator takes none"),
        (Request(0, 0), SamplerConfig(steps=51), r"sampling\.steps=51.*1\.\.50"),
        (Request(0, 0), SamplerConfig(guidance=2.0), "conditional generator"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(loaded, request_, sampler, message):
    with pytest.raises(ConfigError, match=message):
        drawn(loaded, [request_], sampler)


def test_values_that_are_not_finite_name_the_generator():
    loaded = loaded_generator()
    loaded.model.denoiser.encoder_list[0][0].weight.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="tiny.*not finite"):
        drawn(loaded, [Request(0)])


def draw_as_rank(rank: int, folder: Path) -> None:
    """A process of two; forked, so that it need not import everything again."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    parallel = Parallel(rank, 2, rank, torch.device("cpu"), "ddp")
    loaded = loaded_generator(num_states=3)
    found = {}
    for count in (1, 5):
        requests = build_requests(None, count, seed=0, groups=loaded.groups)
        found[count] = drawn(loaded, requests, parallel=parallel)
    torch.save(found, folder / f"{rank}.pt")
    parallel.barrier()
    os._exit(0)  # the parent's exit handlers are not this process's


def test_two_processes_make_the_same_networks(loaded, tmp_path: Path):
    """One network: its tokens are split; five: the networks are."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=draw_as_rank, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    found, others = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert not any(others.values())
    for count in (1, 5):
        alone = drawn(loaded, build_requests(None, count, seed=0, groups=loaded.groups))
        assert sorted(found[count]) == sorted(alone)
        for key, state in alone.items():
            assert_same(state, found[count][key])
