"""Networks as descriptions: what names mean, what is built, with numbers and without."""

import json
import re

import pytest
import torch
from torch import nn

from common.errors import ConfigError, DataError
from logah.architecture_stats import count_parameters
from logah.architectures import Architecture, gpt2, llama, resolve_target, vit
from logah.meta_building import build_on_meta, move_to_meta

TINY = (
    vit(4, 2, 2, 16),
    gpt2(16, 2, 2, vocab_size=50, n_positions=32),
    gpt2(16, 2, 2, vocab_size=50, n_positions=32, tie_word_embeddings=True),
    llama(16, 2, 2, 1, vocab_size=50),
    resolve_target("squeezenet1_1?num_classes=7"),
    resolve_target("regnet_y_400mf"),  # its constructor reads numbers off tensors
    resolve_target("timm:mobilenetv3_small_050"),
    resolve_target({"model_type": "opt", "hidden_size": 16, "num_attention_heads": 2, "ffn_dim": 32,
                    "num_hidden_layers": 2, "vocab_size": 60, "word_embed_proj_dim": 16}),
)  # fmt: skip


def sharing(network: nn.Module) -> list[list[str]]:
    """Names that share a tensor."""
    places: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    return sorted(names for names in places.values() if len(names) > 1)


@pytest.mark.parametrize("architecture", TINY, ids=str)
def test_a_network_on_meta_has_the_tensors_and_ties_of_the_real_one(architecture):
    real, bare = architecture.build(), architecture.build_meta()
    tensors = [*bare.parameters(), *bare.buffers()]
    assert all(tensor.is_meta for tensor in tensors)
    shapes = {name: tensor.shape for name, tensor in real.state_dict(keep_vars=True).items()}
    assert {name: tensor.shape for name, tensor in bare.state_dict(keep_vars=True).items()} == shapes
    assert sharing(real) == sharing(bare)
    assert sum(parameter.numel() for parameter in real.parameters()) == count_parameters(architecture)


def test_building_on_meta_draws_no_random_number():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    for architecture in TINY[:2]:
        architecture.build_meta()
    resolve_target("regnet_y_400mf").build_meta()
    assert torch.equal(torch.rand(3), expected)


def test_moving_a_tied_network_to_meta_keeps_it_tied():
    network = TINY[2].build()
    assert sharing(network) and sharing(move_to_meta(network)) == sharing(TINY[2].build())


def test_a_constructor_that_fails_for_its_own_reasons_says_so():
    def build() -> nn.Module:
        raise RuntimeError("out of ideas")

    with pytest.raises(RuntimeError, match="out of ideas"):
        build_on_meta(build)


# ------------------------------------------------------------------------------------------------------ what names mean


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2-large", 838_359_040),
        ("gpt2-large?tie=true", 774_030_080),
        ("llama-small", 181.7e6),
        ("llama-medium", 451.4e6),
        ("llama-large", 747.8e6),
        ("llama-8b", 8_030_261_248),
        ("vit_l_imagenet", 304_326_632),
    ],
)
def test_presets_have_the_published_sizes(name, parameters):
    assert count_parameters(resolve_target(name)) == pytest.approx(parameters, rel=2e-4 if parameters % 1e5 == 0 else 0)


def test_names_reach_the_same_network_as_descriptions(tmp_path):
    large = gpt2(1280, 36, 20)
    for name in ("gpt2-large", "GPT2_large", {"name": "gpt2-large"}):
        assert resolve_target(name) == large
    assert resolve_target(large) is large
    assert resolve_target({"family": "vit", "patch_size": 2, "num_layers": 3, "num_heads": 2, "hidden_dim": 8}) == vit(
        2, 3, 2, 8
    )
    assert resolve_target("torchvision:resnet18") == resolve_target("resnet18")
    stored = tmp_path / "architecture.json"
    stored.write_text(json.dumps(large.to_json()))
    assert resolve_target(str(stored)) == resolve_target(str(tmp_path)) == large
    assert hash(resolve_target("gpt2-large")) == hash(large)


def test_options_after_a_name_are_written_in_two_ways():
    small = resolve_target({"name": "resnet18", "num_classes": 10, "image_size": 64})
    assert resolve_target("resnet18?num_classes=10&image_size=64") == small
    assert resolve_target("resnet18?num_classes:10?image_size:64") == small  # as Hydra takes it without quotes
    assert resolve_target("gpt2-large?tie:true") == gpt2(1280, 36, 20, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="resnet18[?]num_classes"):
        resolve_target("resnet18?num_classes")


def test_a_configuration_of_transformers_is_a_target(tmp_path):
    TINY[1].hf_config().save_pretrained(tmp_path)
    found = resolve_target(str(tmp_path))
    assert found.family == "hf" and found.kind == "lm"
    assert (found.vocab_size, found.block_size) == (50, 32)
    assert count_parameters(found) == count_parameters(TINY[1])


def test_facts_of_networks():
    assert (vit(4, 2, 2, 16).num_classes, vit(4, 2, 2, 16).image_size) == (10, 32)
    assert (resolve_target("inception_v3").image_size, resolve_target("resnet18").image_size) == (299, 224)
    timm_vit = resolve_target("timm:vit_tiny_patch16_384")
    assert (timm_vit.num_classes, timm_vit.image_size, timm_vit.kind) == (1000, 384, "vision")
    language = llama(16, 2, 2)
    assert (language.kind, language.vocab_size, language.num_classes, language.image_size) == ("lm", 128256, None, None)
    assert resolve_target("vit_b_16?image_size=32&num_classes=5").build_meta().image_size == 32
    assert resolve_target("timm:vit_tiny_patch16_224?image_size=32").build_meta().pos_embed.shape[1] == 2 * 2 + 1
    assert resolve_target("timm:resnet18?image_size=64").build_meta().num_classes == 1000  # reads any number of pixels


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_the_one_asked_for(attention):
    assert TINY[3].build_meta(attention=attention).config._attn_implementation == attention


def test_descriptions_survive_json():
    for architecture in TINY:
        again = Architecture.from_json(json.loads(json.dumps(architecture.to_json())))
        assert again == architecture and again.key == architecture.key


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("gpt2-lrage", "Did you mean gpt2-large"),
        ("timm:vit_of_dreams", "is not a network of timm"),
        ("torchvision:resnet17", "is not a classifier of torchvision"),
        ({"model_type": "imaginary"}, "model_type='imaginary'"),
        ({"depth": 3}, "describes no network"),
        ({"family": "gnn"}, "target.family='gnn'"),
        ({"family": "vit", "patch_size": 5, "num_layers": 1, "num_heads": 1, "hidden_dim": 8}, "image_size=32"),
        ({"family": "vit", "patch_size": 4, "num_layers": 1, "num_heads": 3, "hidden_dim": 8}, "num_heads=3"),
        ({"family": "gpt2", "n_embd": 10, "n_layer": 1, "n_head": 4}, "n_embd=10"),
        ({"family": "llama", "hidden_size": 8, "num_hidden_layers": 0, "num_attention_heads": 2}, "num_hidden_layers"),
        ("module:nowhere:Net", "cannot be imported"),
        ("module:os:system", "neither a class of networks"),
    ],
)
def test_targets_that_are_none_are_named(target, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve_target(target).build_meta()


def test_options_that_a_constructor_refuses_are_named():
    with pytest.raises(ConfigError, match="colour_of_layers"):
        resolve_target("resnet18?colour_of_layers=3").build_meta()


def test_files_that_describe_nothing_are_named(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(DataError, match=r"broken\.json cannot be read"):
        resolve_target(str(broken))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"without architecture\.json or config\.json"):
        resolve_target(str(empty))
    with pytest.raises(DataError, match="is no architecture"):
        Architecture.from_json({"family": "vit"})


def test_code_is_imported_for_a_command_and_never_for_a_file(tmp_path):
    named = resolve_target("module:tests.logah.golden_graphs:SmallConvNet")
    network = Architecture("module", {**named.options, "arguments": {"c": 4, "k": 3}}).build()
    assert network.fc.out_features == 3
    with pytest.raises(DataError, match="code"):
        Architecture.from_json(named.to_json())
    stored = tmp_path / "net.json"
    stored.write_text(json.dumps({"family": "module", "path": "os:system"}))
    with pytest.raises(DataError, match="code to run"):
        resolve_target(str(stored))
