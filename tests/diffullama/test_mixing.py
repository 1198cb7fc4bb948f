"""Mixtures: the weights hold, the reference's order of sources, nothing twice before it is due, exact resumption."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

from common.data.dataset import TokenDataset, TokenStream
from common.data.loader import build_train_loader
from common.errors import ConfigError, DataError
from diffullama.mixing import SEVEN_B_WEIGHTS, MixedDataset, source_sequence


def dataset(first: int, rows: int, length: int = 2) -> TokenDataset:
    """Rows [k, k] for k = first, first + 1, ..."""
    tokens = np.repeat(np.arange(first, first + rows), length)
    return TokenDataset(TokenStream(tokens, rows, len(tokens)), length, vocab_size=1000)


def mixture(**options) -> MixedDataset:
    sources = {"slimpajama": dataset(0, 70), "starcoder": dataset(500, 30)}
    return MixedDataset(sources, options.pop("weights", SEVEN_B_WEIGHTS), seed=options.pop("seed", 0), **options)


def ids(mixed: MixedDataset, rows) -> list[int]:
    return mixed.fetch(rows)["tokens"][:, 0].tolist()


def test_sources_are_drawn_as_pythons_generator_draws_them_one_by_one():
    weights = [0.693584, 0.306416, 0.2]
    for seed in (0, 2829, 2**31):
        rng = random.Random(seed)
        expected = [rng.choices(range(3), weights=weights, k=1)[0] for _ in range(2000)]
        assert source_sequence(weights, 2000, seed).tolist() == expected


def test_shares_are_the_weights():
    mixed = mixture(num_samples=20_000)
    share = mixed.counts()["starcoder"] / len(mixed)
    assert abs(share - 0.306416) < 3 * (0.306416 * 0.693584 / 20_000) ** 0.5
    assert sum(SEVEN_B_WEIGHTS.values()) == pytest.approx(1)


def test_every_row_of_a_source_comes_once_before_any_comes_twice():
    mixed = mixture(num_samples=500)
    found = ids(mixed, range(500))
    for low, rows in ((0, 70), (500, 30)):
        own = [token for token in found if low <= token < low + 400]
        for start in range(0, len(own) - rows, rows):
            assert len(set(own[start : start + rows])) == rows
        assert own[:rows] != own[rows : 2 * rows]


def test_default_ends_where_the_first_source_has_been_read_once():
    mixed = mixture()
    assert len(mixed) == int(min(70 / 0.693584, 30 / 0.306416))
    counts = Counter(ids(mixed, range(len(mixed))))
    assert max(counts.values()) <= 2  # a random share may pass the end of one source by a few rows
    assert sum(count == 2 for count in counts.values()) <= 12


def test_samples_depend_on_their_number_only():
    mixed = mixture(num_samples=300)
    whole = ids(mixed, range(300))
    rows = torch.randperm(300, generator=torch.Generator().manual_seed(1)).tolist()
    again = mixture(num_samples=300)
    assert ids(again, rows) == [whole[row] for row in rows]
    assert [int(again[row]["tokens"][1]) for row in rows[:5]] == [whole[row] for row in rows[:5]]
    assert ids(mixture(num_samples=300, seed=1), range(300)) != whole
    assert ids(mixture(num_samples=300, shuffle=False), range(300))[:3] != whole[:3]


def test_mixture_resumes_and_ranks_do_not_overlap():
    def loader(rank: int = 0, world_size: int = 1):
        return build_train_loader(
            mixture(num_samples=64),
            global_size=4,
            micro_size=2,
            seed=0,
            rank=rank,
            world_size=world_size,
            shuffle=False,
        )

    def take(source, count: int) -> list[int]:
        return [
            token for batch, _ in zip(source, range(count), strict=False) for token in batch["tokens"][:, 0].tolist()
        ]

    alone = take(loader(), 32)
    assert alone == ids(mixture(num_samples=64), range(64))
    halves = [take(loader(rank, 2), 16) for rank in range(2)]
    woven = [halves[rank][2 * step + row] for step in range(16) for rank in range(2) for row in range(2)]
    assert woven == alone
    second = loader()
    second.load_state_dict({"micro_batches": 13, "micro_size": 2, "world_size": 1, "num_rows": 64, "seed": 0})
    assert take(second, 5) == alone[26:36]


def test_mixtures_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="give starcoder a weight"):
        mixture(weights={"slimpajama": 1.0})
    with pytest.raises(ConfigError, match="remove books"):
        mixture(weights={**SEVEN_B_WEIGHTS, "books": 0.1})
    with pytest.raises(ConfigError, match="must be a positive number"):
        mixture(weights={"slimpajama": 1.0, "starcoder": -1.0})
    with pytest.raises(ConfigError, match="different lengths"):
        MixedDataset({"a": dataset(0, 4), "b": dataset(0, 4, length=3)}, {"a": 1, "b": 1}, seed=0)
    with pytest.raises(ConfigError, match="at least one source"):
        MixedDataset({}, {}, seed=0)
    with pytest.raises(DataError, match="a, a source of the mixture, is empty"):
        MixedDataset({"a": []}, {"a": 1}, seed=0)
