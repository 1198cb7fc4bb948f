"""Batches of one bucket each, whatever the sizes of the buckets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from mup_dit.buckets import BucketOrder


def buckets(sizes) -> dict:
    ends = np.cumsum(sizes)
    return {key: np.arange(end - size, end) for key, (size, end) in enumerate(zip(sizes, ends, strict=True))}


@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=4), batch=st.integers(1, 5), seed=st.integers(0, 2**31 - 1)
)
def test_every_batch_is_of_one_bucket_and_an_epoch_repeats_no_row(sizes, batch, seed):
    if max(sizes) < batch:
        with pytest.raises(DataError, match="no bucket has enough"):
            BucketOrder(buckets(sizes), batch, seed)
        return
    order = BucketOrder(buckets(sizes), batch, seed)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    for epoch in range(2):
        rows = order.rows(epoch * order.num_rows, order.num_rows)
        assert len(set(rows)) == len(rows) == sum(size // batch * batch for size in sizes)
        assert (np.ptp(owner[rows].reshape(-1, batch), axis=1) == 0).all()


def test_positions_can_be_read_in_any_pieces():
    order, again = (BucketOrder(buckets([7, 9]), 3, 0) for _ in range(2))
    whole = order.rows(0, 60)
    assert np.array_equal(whole, np.concatenate([again.rows(start, 4) for start in range(0, 60, 4)]))
    assert not np.array_equal(whole[:15], whole[15:30])


def test_rare_buckets_are_left_out():
    order = BucketOrder(buckets([4, 9]), 2, 0, min_rows=5)
    assert order.dropped == 4 and order.rows(0, order.num_rows).min() == 4
