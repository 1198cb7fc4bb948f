"""Laws of random networks: exact first draws (golden cases), ranges, and what is left out."""

import numpy as np
import pytest
from numpy.random import RandomState

from common.errors import ConfigError
from common.testing.golden import DEFAULT_GOLDEN_DIR
from logah.architecture_stats import count_parameters
from logah.generators import LAWS, draw_from_grid, draw_gpt2, draw_llama, draw_trainer_llama, draw_vit


def draws(law, count: int = 300, **options):
    rng = RandomState(4)
    return [law(rng, **options) for _ in range(count)]


@pytest.mark.parametrize(
    ("law", "columns", "name"),
    [
        (draw_vit, ("patch_size", "num_layers", "num_heads", "hidden_dim"), "out_vit"),
        (draw_gpt2, ("n_layer", "n_embd", "n_head"), "out_gpt2"),
        (draw_llama, ("num_hidden_layers", "hidden_size", "num_attention_heads"), "out_llama"),
    ],
)
def test_the_first_draws_are_the_published_ones(law, columns, name):
    with np.load(DEFAULT_GOLDEN_DIR / "logah" / "generators.npz") as archive:
        expected = archive[name]
    rng = RandomState(1)
    drawn = [law(rng).options for _ in expected]
    assert np.array_equal([[options[column] for column in columns] for options in drawn], expected)


def test_vits_keep_to_their_ranges():
    for architecture in draws(draw_vit):
        options = architecture.options
        low, high = {3: (384, 512), 4: (256, 384), 5: (256, 384)}.get(options["num_layers"], (128, 256))
        assert low <= options["hidden_dim"] <= high and options["hidden_dim"] % 32 == 0
        assert options["num_heads"] in ((3, 6, 12) if options["hidden_dim"] % 12 == 0 else (4, 8))
        assert options["mlp_dim"] == 4 * options["hidden_dim"] and options["patch_size"] in (2, 4)
    large = draws(draw_vit, 50, image_size=224, num_classes=1000)
    assert {each.options["patch_size"] for each in large} == {16, 32}
    assert {each.num_classes for each in large} == {1000}


def test_the_vocabulary_does_not_change_which_networks_are_drawn():
    for law, width in ((draw_gpt2, "n_embd"), (draw_llama, "hidden_size")):
        widths = [[each.options[width] for each in draws(law, 60, **o)] for o in ({}, {"vocab_size": 512})]
        assert widths[0] == widths[1]


def test_llama_networks_stay_below_fifty_million():
    drawn = draws(draw_llama)
    assert max(map(count_parameters, drawn)) <= 50_000_000
    assert 192 not in {each.options["hidden_size"] for each in drawn}


def test_every_network_of_the_llama_trainer_can_be_built():
    drawn = draws(draw_trainer_llama)  # descriptions refuse heads that do not divide
    assert {each.options["intermediate_size"] / each.options["hidden_size"] for each in drawn} == {3.5, 4.0}
    assert {each.options["num_key_value_heads"] for each in drawn} >= {1, 2, 4}
    smallest = min(drawn, key=count_parameters)
    assert smallest.build_meta().config.num_hidden_layers == smallest.options["num_hidden_layers"]


@pytest.mark.parametrize("family", ["vit", "gpt2", "llama"])
def test_a_grid_draws_from_every_list(family):
    drawn = [
        draw_from_grid(RandomState(seed), family, depths=(2, 3), widths=(24, 32), heads=(2, 3), mlp_ratios=(2, 4))
        for seed in range(400)
    ]
    assert len(set(drawn)) == 2 * 3 * 2  # a width of 32 has two heads, one of 24 two or three
    assert count_parameters(drawn[0]) == sum(each.numel() for each in drawn[0].build_meta().parameters())


def test_lists_that_cannot_be_drawn_from_are_named():
    rng = RandomState(0)
    with pytest.raises(ConfigError, match=r"nets\.depths is empty"):
        draw_from_grid(rng, "vit", depths=(), widths=(8,), heads=(2,))
    with pytest.raises(ConfigError, match=r"nets\.heads=\[3\]: none divides"):
        draw_from_grid(rng, "vit", depths=(1,), widths=(8,), heads=(3,))
    with pytest.raises(ConfigError, match=r"nets\.family='rnn'"):
        draw_from_grid(rng, "rnn", depths=(1,), widths=(8,), heads=(2,))


def test_numbers_in_descriptions_are_plain():
    for law in LAWS.values():
        assert all(type(value) in (int, float, bool, type(None)) for value in law(RandomState(0)).options.values())
