"""Mimetic attention and weight subcloning."""

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from common.errors import ConfigError
from logah.initialisations import attention_maps, mimetic_init, subclone
from logah.subcloning import layers_to_take


def vit(layers=2, heads=2, width=16, classes=3) -> nn.Module:
    torch.manual_seed(layers)
    return VisionTransformer(8, 4, layers, heads, width, 2 * width, num_classes=classes).eval()


def gpt2(layers=2, heads=2, width=16) -> nn.Module:
    torch.manual_seed(layers)
    none = {"bos_token_id": None, "eos_token_id": None}
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "vocab_size": 30, "n_positions": 8}
    return GPT2LMHeadModel(GPT2Config(**sizes, **none)).eval()


def llama(layers=2, heads=4, shared=2, width=32) -> nn.Module:
    torch.manual_seed(layers)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "vocab_size": 30}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=heads, num_key_value_heads=shared, **sizes)).eval()


@pytest.mark.parametrize("build", [vit, gpt2, llama])
def test_products_of_attention_maps_have_the_mimetic_diagonal(build):
    model = build(width=32)
    facts = mimetic_init(model, seed=0)
    assert facts["attentions"] == 2
    for maps in attention_maps(model):
        width = maps.query_dq.shape[1] // maps.num_heads
        shared = maps.num_heads // maps.num_key_value_heads
        diagonals = []
        for head in range(maps.num_heads):
            group = head // shared
            query, key = maps.query_dq[:, head * width :][:, :width], maps.key_dv[:, group * width :][:, :width]
            diagonals.append((query @ key.T).diagonal().mean())
        # of 0.7 Z + 0.7 I, truncated to the width of a head
        assert 0.2 < torch.stack(diagonals).mean() < 0.9
        if shared == 1:
            product = maps.value_dv @ maps.output_qd
            assert -0.55 < product.diagonal().mean() < -0.25
            off = product - product.diagonal().diag()
            assert off.std() == pytest.approx(0.4 / 32**0.5, rel=0.2)


def test_mimetic_init_depends_on_its_seed_alone_and_spares_other_weights():
    first, second, third = vit(), vit(), vit()
    before = {name: value.clone() for name, value in first.state_dict().items()}
    torch.manual_seed(5)
    mimetic_init(first, seed=1)
    mimetic_init(second, seed=1)
    mimetic_init(third, seed=2, positions=False)
    states = [model.state_dict() for model in (first, second, third)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in before)
    changed = {name for name, value in before.items() if not torch.equal(value, states[2][name])}
    assert changed and all("in_proj_weight" in name or "out_proj.weight" in name for name in changed)


def test_mimetic_init_refuses_networks_without_attention():
    with pytest.raises(ConfigError, match="none of a known kind"):
        mimetic_init(nn.Sequential(nn.Linear(2, 2)), seed=0)


@pytest.mark.parametrize("build", [vit, gpt2, llama])
def test_a_clone_of_equal_size_is_the_source_itself(build):
    source, target = build(), build()
    for parameter in target.parameters():
        nn.init.normal_(parameter)
    assert subclone(target, source) == {"layers": [0, 1], "kept_random": []}
    for name, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[name]), name


@pytest.mark.parametrize(
    ("build", "large", "small"),
    [
        (vit, {"layers": 4, "heads": 4, "width": 32}, {"layers": 2, "heads": 2, "width": 16}),
        (gpt2, {"layers": 3, "heads": 4, "width": 32}, {"layers": 2, "heads": 2, "width": 8}),
        (
            llama,
            {"layers": 4, "heads": 4, "shared": 2, "width": 64},
            {"layers": 3, "heads": 2, "shared": 1, "width": 32},
        ),
    ],
)
def test_every_parameter_of_a_smaller_network_comes_from_the_source(build, large, small):
    source, target = build(**large), build(**small)
    for parameter in target.parameters():
        nn.init.constant_(parameter, 1234.0)
    facts = subclone(target, source, rescale=False)
    assert facts["kept_random"] == [] and facts["layers"] == layers_to_take(small["layers"], large["layers"])
    values = set(torch.cat([p.detach().flatten() for p in source.parameters()]).tolist())
    for name, parameter in target.named_parameters():
        assert set(parameter.detach().flatten().tolist()) <= values, name


def test_units_that_are_zero_elsewhere_are_left_out():
    source = vit(layers=1, heads=2, width=16)
    dead = [1, 3, 5, 7, 8, 10, 12, 14]
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            for axis, size in enumerate(parameter.shape):
                if size == 16 and "in_proj_bias" not in name and not (axis == 1 and "out_proj.weight" in name):
                    parameter.index_fill_(axis, torch.tensor(dead), 0.0)
    target = vit(layers=1, heads=1, width=8)
    subclone(target, source)
    alive = [one for one in range(16) if one not in dead]
    assert torch.equal(target.encoder.pos_embedding, source.encoder.pos_embedding[..., alive])


def test_what_cannot_be_cloned_is_kept_or_refused():
    target = vit(classes=5)
    head = target.heads.head.weight.clone()
    assert subclone(target, vit())["kept_random"] == ["heads.head.weight", "heads.head.bias"]
    assert torch.equal(target.heads.head.weight, head)
    with pytest.raises(ConfigError, match="residual is 16; the target's is 32"):
        subclone(vit(width=32), vit())
    with pytest.raises(ConfigError, match="one family"):
        subclone(vit(), gpt2())
    with pytest.raises(ConfigError, match="not Linear"):
        subclone(nn.Linear(2, 2), nn.Linear(2, 2))


def test_middle_layers_are_dropped_or_doubled():
    assert layers_to_take(3, 6) == [0, 1, 5]
    assert layers_to_take(6, 4) == [0, 1, 2, 2, 2, 3]
