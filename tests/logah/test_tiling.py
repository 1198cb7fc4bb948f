"""Decoded tensors in the size of their target."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logah.tiling import grid_side, position_table, tile


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


@given(have=st.lists(st.integers(1, 5), min_size=1, max_size=3), data=st.data())
def test_entries_repeat_along_every_dimension(have: list[int], data):
    want = [data.draw(st.integers(1, 12)) for _ in have]
    w = numbered(*have)
    found = tile(w, tuple(want))
    assert found.shape == tuple(want)
    index = torch.meshgrid(*[torch.arange(size) for size in want], indexing="ij")
    assert torch.equal(found, w[tuple(i % size for i, size in zip(index, have, strict=True))])


@given(have=st.tuples(*[st.integers(1, 4)] * 2), want=st.tuples(*[st.integers(1, 9)] * 2), kernel=st.integers(1, 5))
def test_kernels_have_the_asked_size_whatever_was_decoded(have: tuple, want: tuple, kernel: int):
    found = tile(numbered(*have, 3, 3), (*want, kernel, kernel))
    assert found.shape == (*want, kernel, kernel)
    if kernel == 3:
        assert torch.equal(found[: have[0], : have[1]], numbered(*have, 3, 3)[: want[0], : want[1]])


def test_matrices_take_the_pixel_at_the_centre():
    w = numbered(2, 3, 5, 5)
    assert torch.equal(tile(w, (2, 3)), w[..., 2, 2])
    assert torch.equal(tile(numbered(2, 3), (2, 3, 1, 1))[..., 0, 0], numbered(2, 3))


def test_tensors_of_three_dimensions_are_repeated_too():
    # where the released code returns a wrong shape without an error
    assert torch.equal(tile(numbered(4, 1, 1), (6, 1, 1))[:, 0, 0], torch.tensor([0.0, 1, 2, 3, 0, 1]))


@pytest.mark.parametrize("positions, side, front", [(1, 1, 0), (16, 4, 0), (17, 4, 1), (66, 8, 2), (20, 5, 0)])
def test_positions_are_a_square_and_tokens_before_it(positions: int, side: int, front: int):
    assert grid_side(positions) == (side, front)


def test_position_tables_list_the_grid_row_by_row_after_the_tokens():
    grid = numbered(1, 3, 2, 2)
    table = position_table(grid, 5)
    assert table.shape == (1, 5, 3) and not table[0, 0].any()
    assert torch.equal(table[0, 1:], grid[0].flatten(1).T)
    rows = torch.full((2, 3), 9.0)
    assert torch.equal(position_table(grid, 6, rows)[0, :2], rows)
    assert torch.equal(position_table(grid, 3)[0], grid[0].flatten(1).T[:3])  # not square: the first of the grid


def test_dimensions_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"\(2, 2, 2\) does not fit a parameter of shape \(4, 4\)"):
        tile(numbered(2, 2, 2), (4, 4))
