"""Loaders: the row layout of the contract, every sample once an epoch, exact positions for any number of workers."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.data.loader import ShuffledOrder, build_train_loader, build_validation_loader
from common.errors import CheckpointError, ConfigError, DataError
from common.seeding import generator


class Numbers:
    """Row i holds i and i squared."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def fetch(self, rows):
        rows = torch.from_numpy(np.asarray(rows))
        assert ((rows >= 0) & (rows < self.size)).all()
        return {"row": rows, "square": rows**2}


class FastNumbers(Numbers):
    """Read by workers eleven rows at a time."""

    rows_per_read = 11


class SlowNumbers:
    """Only one row at a time."""

    def __len__(self):
        return 10

    def __getitem__(self, row):
        return {"row": torch.tensor(row)}


def loader(size=23, global_size=8, micro_size=2, **options):
    return build_train_loader(
        Numbers(size), **({"global_size": global_size, "micro_size": micro_size, "seed": 3} | options)
    )


def take(source, count):
    return [batch["row"].tolist() for batch in itertools.islice(source, count)]


def samples(size, seed, count):
    """The contract's sequence of dataset rows, written out."""
    epochs = itertools.count()
    rows = itertools.chain.from_iterable(
        torch.randperm(size, generator=generator(seed, "shuffle", epoch)).tolist() for epoch in epochs
    )
    return list(itertools.islice(rows, count))


@given(
    size=st.integers(1, 40),
    micro=st.integers(1, 4),
    world=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_micro_batch_a_of_rank_r_holds_rows_from_a_times_w_plus_r(size, micro, world, accumulation, seed):
    global_size, steps = micro * world * accumulation, 4
    sequence = samples(size, seed, steps * global_size)
    for rank in range(world):
        got = take(loader(size, global_size, micro, seed=seed, rank=rank, world_size=world), steps * accumulation)
        for step in range(steps):
            for a in range(accumulation):
                start = step * global_size + (a * world + rank) * micro
                assert got[step * accumulation + a] == sequence[start : start + micro]


def test_two_accumulation_steps_see_what_two_processes_see():
    alone = take(loader(global_size=8, micro_size=4), 10)
    pair = [take(loader(global_size=8, micro_size=4, rank=r, world_size=2), 5) for r in range(2)]
    assert alone == [batch for step in zip(*pair) for batch in step]


def test_ranks_share_no_sample_within_an_epoch_and_cover_it():
    ranks = [take(loader(24, 8, 2, rank=r, world_size=4), 3) for r in range(4)]
    assert sorted(np.ravel(ranks).tolist()) == list(range(24))


def test_epochs_differ_and_seeds_differ():
    order = ShuffledOrder(50, seed=1)
    first, second = order.rows(0, 50), order.rows(50, 50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first.tolist() != second.tolist()
    assert ShuffledOrder(50, seed=2).rows(0, 50).tolist() != first.tolist()
    assert ShuffledOrder(50, seed=1, shuffle=False).rows(48, 4).tolist() == [48, 49, 0, 1]


def test_going_back_gives_the_same_rows_again():
    order = ShuffledOrder(5, seed=1)
    late = order.rows(101, 9).tolist()
    early = order.rows(0, 9).tolist()
    assert order.rows(101, 9).tolist() == late
    assert order.rows(0, 9).tolist() == early


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_batches(workers):
    assert take(loader(num_workers=workers), 12) == take(loader(), 12)


@pytest.mark.parametrize("consumed", [1, 5, 13])
def test_reads_of_several_micro_batches_change_no_batch_and_no_position(consumed):
    def fast():
        return build_train_loader(FastNumbers(23), global_size=8, micro_size=2, seed=3, num_workers=2)

    whole, first, second = take(loader(), 40), fast(), fast()
    assert take(first, consumed) == whole[:consumed]
    second.load_state_dict(first.state_dict())
    assert take(second, 40 - consumed) == whole[consumed:]


@pytest.mark.parametrize("before, after", [(0, 0), (2, 2), (2, 0), (0, 1)])
def test_a_saved_position_continues_exactly_also_after_prefetching(before, after):
    whole = take(loader(), 20)
    first = loader(num_workers=before)
    assert take(first, 7) == whole[:7]
    second = loader(num_workers=after)
    second.load_state_dict(first.state_dict())
    assert take(second, 13) == whole[7:]
    assert second.state_dict()["micro_batches"] == 20


def test_iterating_again_continues_where_the_last_iteration_stopped():
    source, whole = loader(), take(loader(), 10)
    assert take(source, 4) + take(source, 6) == whole


def test_seek_goes_to_the_start_of_a_step_for_any_number_of_processes():
    sequence = samples(23, 3, 100)
    for rank, world in ((0, 1), (1, 2), (3, 4)):
        source = loader(rank=rank, world_size=world)
        source.seek(9)
        assert take(source, 1) == [sequence[72 + 2 * rank : 74 + 2 * rank]]


def test_a_position_carries_over_to_another_layout_at_a_step_boundary():
    source = loader()  # 4 micro-batches of 2 per step
    take(source, 8)
    moved = loader(micro_size=4, rank=1, world_size=2)
    moved.load_state_dict(source.state_dict())
    expected = loader(micro_size=4, rank=1, world_size=2)
    expected.seek(2)
    assert take(moved, 3) == take(expected, 3)
    take(source, 1)
    with pytest.raises(CheckpointError, match="after 18 samples, which is no multiple"):
        moved.load_state_dict(source.state_dict())


@pytest.mark.parametrize(
    "change, match", [({"size": 24}, "24 rows.*saved with 23"), ({"seed": 4}, "seed is 4.*with 3")]
)
def test_another_dataset_or_seed_is_refused(change, match):
    with pytest.raises(CheckpointError, match=match):
        loader(**change).load_state_dict(loader().state_dict())


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generator_is_left_alone(workers):
    before = torch.random.get_rng_state()
    take(loader(num_workers=workers), 3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_dataset_smaller_than_the_batch_repeats_over_epochs():
    assert np.ravel(take(loader(size=3), 8)).tolist() == samples(3, 3, 16)


def test_batches_keep_all_fields_and_pass_through_the_transform():
    batch = next(iter(loader(transform=lambda batch: batch | {"twice": 2 * batch["row"]})))
    assert torch.equal(batch["square"], batch["row"] ** 2)
    assert torch.equal(batch["twice"], batch["row"] * 2)


def test_a_dataset_without_fetch_works_row_by_row():
    source = build_train_loader(SlowNumbers(), global_size=4, micro_size=4, seed=0)
    assert np.ravel(take(source, 5)).tolist() == samples(10, 0, 20)


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"global_size": 9}, ConfigError, "global batch of 9 samples is not a multiple"),
        ({"world_size": 3}, ConfigError, "micro-batch 2 x 3 processes"),
        ({"rank": 2, "world_size": 2}, ConfigError, r"rank=2 must lie in 0\.\.1"),
        ({"size": 0}, DataError, "dataset is empty"),
    ],
)
def test_sizes_that_cannot_work_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        loader(**options)


# ---------------------------------------------------------------- validation


@given(size=st.integers(1, 40), batch=st.integers(1, 9), limit=st.none() | st.integers(1, 50), world=st.integers(1, 4))
def test_validation_batches_over_ranks_are_those_of_one_process(size, batch, limit, world):
    source = build_validation_loader(Numbers(size), batch_size=batch, max_samples=limit)
    alone = {index: rows["row"].tolist() for index, rows in source.batches()}
    assert [row for index in sorted(alone) for row in alone[index]] == list(range(min(size, limit or size)))
    assert sorted(alone) == list(range(len(source)))
    shared = [pair for rank in range(world) for pair in source.batches(rank, world)]
    assert len(shared) == len(alone)
    assert {index: rows["row"].tolist() for index, rows in shared} == alone


@pytest.mark.parametrize(
    "size, options, error",
    [(0, {"batch_size": 1}, DataError), (3, {"batch_size": 0}, ConfigError), (3, {"max_samples": 0}, ConfigError)],
)
def test_an_unusable_validation_set_is_refused(size, options, error):
    with pytest.raises(error):
        build_validation_loader(Numbers(size), **({"batch_size": 2} | options))
