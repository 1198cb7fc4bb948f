"""Shards of a sequence: what the two layouts hold, and that they fit together again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from diffullama.sequence_parallel import MODES, shard_sequence, unshard_sequence


def test_contiguous_shards_are_neighbours():
    x_BL = torch.arange(16).view(2, 8)
    assert [shard.tolist() for shard in shard_sequence(x_BL, 2)] == [
        [[0, 1, 2, 3], [8, 9, 10, 11]],
        [[4, 5, 6, 7], [12, 13, 14, 15]],
    ]


def test_zigzag_pairs_an_early_with_a_late_chunk():
    x_BL = torch.arange(12)[None]
    shards = shard_sequence(x_BL, 3, "zigzag")
    assert [shard[0].tolist() for shard in shards] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    # Under causal attention position i sees i + 1 keys: all processes do the same work.
    assert len({int((shard + 1).sum()) for shard in shards}) == 1


@given(st.sampled_from(MODES), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_shards_fit_together_again(mode: str, world: int, chunk: int, width: int):
    x = torch.randn(2, 2 * world * chunk, width)
    shards = shard_sequence(x, world, mode)
    assert all(shard.shape == (2, 2 * chunk, width) for shard in shards)
    assert torch.equal(unshard_sequence(shards, mode), x)


def test_uneven_lengths_and_unknown_layouts_are_refused():
    with pytest.raises(ConfigError, match="length=10 .* 8 equal parts .* 8 and 16"):
        shard_sequence(torch.zeros(1, 10), 4, "zigzag")
    with pytest.raises(ConfigError, match="mode='ring'"):
        shard_sequence(torch.zeros(1, 8), 2, "ring")
    with pytest.raises(ConfigError, match="world=0"):
        shard_sequence(torch.zeros(1, 8), 0)
