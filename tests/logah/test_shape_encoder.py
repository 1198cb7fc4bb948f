"""Sizes of parameters as features."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logah.shape_encoder import ShapeEncoder, channel_list, four_sizes, nearest, spatial_list


def test_lists_of_the_published_tables():
    assert len(channel_list(10, "vision")) + 1 == 392 and len(channel_list(10, "llm")) + 1 == 395
    assert len(spatial_list(16)) == 10 and len(spatial_list(11)) == 8
    assert channel_list(64, "vision").count(64) == 1


@given(value=st.integers(1, 200_000), variant=st.sampled_from(["vision", "llm"]))
def test_a_count_takes_the_nearest_entry_and_the_smaller_of_two(value: int, variant: str):
    known = channel_list(10, variant)
    distance = [abs(entry - value) for entry in known]
    assert nearest(value, known) == distance.index(min(distance))


@pytest.mark.parametrize(
    "shape, sizes",
    [
        ((7,), (7, 1, 1, 1)),
        ((5, 6), (5, 6, 1, 1)),
        ((1, 65, 16), (1, 16, 8, 8)),
        ((1, 1, 16), (1, 1, 16, 1)),
        ((96, 1, 1), (96, 1, 1, 1)),
        ((4, 3, 2, 5), (4, 3, 2, 5)),
    ],
)
def test_every_shape_has_four_sizes(shape: tuple, sizes: tuple):
    assert four_sizes(shape) == sizes


def test_small_counts_snap_upwards_and_huge_ones_to_the_last():
    encoder = ShapeEncoder(8, 10, 16)
    eight = encoder.channels.index(8)
    assert [encoder._channel(count) for count in (4, 5, 6, 7, 8)] == [eight] * 5
    assert encoder._channel(10) == encoder.channels.index(10)
    assert encoder._channel(50257) == len(encoder.channels) - 1
    assert encoder._spatial(2) == encoder.spatials.index(3) and encoder._spatial(99) == len(encoder.spatials) - 1


def test_nodes_without_a_shape_and_padding_read_the_last_rows():
    encoder = ShapeEncoder(8, 10, 16)
    y = encoder(torch.zeros(2, 3, 8), [[None, (16, 3, 3, 3)], [(8,), None, (8,)]])
    assert torch.equal(y[0, 0], y[1, 1]) and torch.equal(y[0, 0], y[0, 2]) and torch.equal(y[1, 0], y[1, 2])
    absent = torch.cat([encoder.embed_channel.weight[-1]] * 2 + [encoder.embed_spatial.weight[-1]] * 2)
    assert torch.equal(y[0, 0], absent)
    assert not torch.equal(y[0, 1], y[0, 0])
