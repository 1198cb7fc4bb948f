"""Parameters one after the other: all of them once, equal to single ones, in batches that keep to their limits."""

import pytest
import torch

from common.errors import ConfigError
from logah import sequential_decoding
from logah.architecture_graphs import trace_architecture
from logah.architectures import gpt2, vit
from logah.assignment import plan_targets
from logah.decoding import Group, decode_groups, prepare
from logah.row_chunks import FactoredMatrix
from logah.sequential_decoding import decode_each
from tests.logah.tiny_hypernetwork import tiny_hypernetwork

IDS = {"bos_token_id": 1, "eos_token_id": 2}
NETWORKS = {
    "vision": vit(patch_size=4, num_layers=3, num_heads=2, hidden_dim=72),
    "llm": gpt2(n_embd=72, n_layer=3, n_head=2, vocab_size=100, n_positions=16, **IDS),
}
OPTIONS = [
    {},
    {"decoder": "dense"},
    {"use_1d_decoder": True},
    {"decoder": "lowrank_v2"},
    {"normalisation": "none"},
]


def prepared(variant: str, **options):
    hypernetwork = tiny_hypernetwork(variant=variant, **options)
    architecture = NETWORKS[variant]
    graph = trace_architecture(architecture, variant=variant)
    start = prepare(hypernetwork, hypernetwork.embed_graphs([graph])[0])
    return hypernetwork, start, plan_targets(graph, architecture.build_meta())


@pytest.mark.parametrize("variant", NETWORKS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("most", [2, 16])
def test_each_target_comes_once_as_if_it_were_alone(monkeypatch, variant, options, most):
    monkeypatch.setattr(sequential_decoding, "MOST_NODES", most)
    hypernetwork, start, plan = prepared(variant, **options)
    found = dict(decode_each(hypernetwork, start, plan))
    assert found.keys() == set(plan.targets) and len(found) == len(plan.targets)
    for target, value in found.items():
        is_matrix = isinstance(value, FactoredMatrix)
        assert is_matrix == (options.get("decoder") != "dense" and len(target.shape) == 2)
        value = value.materialise() if is_matrix else value
        alone = decode_groups(hypernetwork, [Group(target, plan, start.rows([target.node]))])[0][0]
        torch.testing.assert_close(value, alone, rtol=1e-5, atol=1e-6, msg=target.name)


@pytest.mark.parametrize("most_values", [1, 3000, 10**6])
def test_what_is_held_at_a_time_keeps_to_its_limit(monkeypatch, most_values):
    monkeypatch.setattr(sequential_decoding, "MOST_VALUES", most_values)
    hypernetwork, start, plan = prepared("llm")
    asked = []
    read_many = hypernetwork.decoder.read_many

    def watched(trunks, wanted):
        factors = read_many(trunks, wanted)
        asked.append((len(trunks[0]), sum(factor.numel() for factor in factors)))
        return factors

    monkeypatch.setattr(hypernetwork.decoder, "read_many", watched)
    assert len(list(decode_each(hypernetwork, start, plan))) == len(plan.targets)
    assert all(nodes == 1 or values <= most_values for nodes, values in asked)
    assert max(nodes for nodes, _ in asked) > 1 or most_values == 1


def test_a_class_token_is_drawn_from_the_generator_it_is_given():
    hypernetwork, start, plan = prepared("vision", class_token_noise=0.5)
    tables = []
    for seed in (0, 0, 1):
        rng = torch.Generator().manual_seed(seed)
        found = {target.name: value for target, value in decode_each(hypernetwork, start, plan, generator=rng)}
        tables.append(found["encoder.pos_embedding"])
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0][:, 0], tables[2][:, 0]) and torch.equal(tables[0][:, 1:], tables[2][:, 1:])


def test_a_decoder_that_is_too_small_is_refused_before_the_first_tensor():
    hypernetwork, start, plan = prepared("llm", max_ck_lora=48)
    with pytest.raises(ConfigError, match="model.max_ck_lora=48 is too small"):
        next(decode_each(hypernetwork, start, plan))
