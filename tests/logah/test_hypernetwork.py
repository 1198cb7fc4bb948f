"""The whole hypernetwork: options, sizes, names."""

import pytest
import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from common.errors import ConfigError
from logah.checkpoints import build, build_empty
from logah.model_config import HyperNetworkConfig, parse_max_shape
from tests.logah.tiny_hypernetwork import tiny_config, tiny_hypernetwork


@pytest.mark.parametrize(
    "options, words",
    [
        ({"hid": 20, "heads": 8}, "model.hid=20 must be a multiple of model.heads=8"),
        ({"hid": 18, "heads": 9}, "of 4"),
        ({"variant": "audio"}, "model.variant"),
        ({"decoder": "sparse"}, "model.decoder"),
        ({"layers": 0}, "model.layers"),
        ({"class_token_noise": -1.0}, "class_token_noise"),
        ({"max_shape": (1, 2, 3)}, "max_shape.*1, 2 or 4"),
    ],
)
def test_options_that_cannot_work_are_named(options: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        tiny_config(**options)


@pytest.mark.parametrize(
    "value, shape",
    [
        (64, (64, 64, 16, 16)),
        ("64", (64, 64, 16, 16)),
        ("64,32", (64, 32, 16, 16)),
        ([64, 32], (64, 32, 16, 16)),
        ((64, 32, 11, 11), (64, 32, 11, 11)),
    ],
)
def test_decoded_sizes_are_one_two_or_four_numbers(value, shape: tuple):
    assert parse_max_shape(value) == shape


@pytest.mark.parametrize("value", ["", "a", "1,2,3", [1, 2, 3, 4, 5], 0, [4, -1]])
def test_other_counts_of_sizes_are_refused(value):
    with pytest.raises(ConfigError, match="model.max_shape"):
        parse_max_shape(value)


def test_building_the_largest_allocates_its_parameters_and_nothing_else():
    registered = []
    handle = register_module_parameter_registration_hook(lambda module, name, value: registered.append(value))
    try:
        model = build_empty(
            HyperNetworkConfig(variant="vision", hid=256, lora_r=256, layers=12, heads=16, num_classes=10)
        )
    finally:
        handle.remove()
    values = sum(parameter.numel() for parameter in model.parameters())
    assert values == sum({id(value): value.numel() for value in registered}.values()) == 289_423_316
    assert 4 * values < 2e9  # bytes; the released code builds a dense decoder of 34 GB first


def test_initial_embeddings_have_the_published_deviation():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(tiny_config(hid=64, decoder="dense", max_shape=(8, 8, 16, 16)))
    for table in (model.embed, model.gnn[0].input_dist_embed, model.gnn[0].attn.edge_embed.embed):
        assert float(table.weight.detach().std()) == pytest.approx(table.embedding_dim**-0.5, rel=0.15)
    assert not model.decoder.conv[2].bias.any() and not model.decoder_1d.fc[2].bias.any()


def test_second_names_share_their_tensor():
    state = tiny_hypernetwork().state_dict()
    assert state["decoder.seq.1.weight"].data_ptr() == state["decoder.l2.weight"].data_ptr()
