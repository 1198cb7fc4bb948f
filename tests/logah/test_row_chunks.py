"""Matrices as factors: the same values, statistics and gradients as the matrix itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from logah import row_chunks
from logah.row_chunks import FactoredMatrix


def draw(rows: int, columns: int, period: int, other: int, rank: int, seed: int) -> tuple[FactoredMatrix, torch.Tensor]:
    """A factored matrix and the same by indexing."""
    rng = torch.Generator().manual_seed(seed)
    a_PR = torch.randn(min(period, rows), rank, generator=rng) + 0.3
    b_RQ = torch.randn(rank, min(other, columns), generator=rng) + 0.3
    product_PQ = a_PR @ b_RQ
    rows_index = torch.arange(rows) % a_PR.shape[0]
    columns_index = torch.arange(columns) % b_RQ.shape[1]
    return FactoredMatrix(a_PR, b_RQ, rows, columns), product_PQ[rows_index][:, columns_index]


SIZES = {
    "rows": st.integers(1, 40), "columns": st.integers(1, 40), "period": st.integers(1, 20),
    "other": st.integers(1, 20), "rank": st.integers(1, 5), "seed": st.integers(0, 1000),
}  # fmt: skip


@given(**SIZES, block=st.integers(1, 200))
def test_blocks_make_the_tiled_product_each_row_once(rows, columns, period, other, rank, seed, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_chunks, "BLOCK_VALUES", block)
        matrix, expected = draw(rows, columns, period, other, rank, seed)
        found = torch.full_like(expected, torch.nan)
        for starts, value in matrix.blocks():
            assert value.numel() <= max(block, columns)
            for start in starts:
                place = found[start : start + len(value)]
                assert place.isnan().all()
                place.copy_(value[: len(place)])
        torch.testing.assert_close(found, expected)
        assert torch.equal(matrix.materialise(), found)
        into = torch.empty(rows, columns)
        assert torch.equal(matrix.materialise(into), found) and torch.equal(into, found)


@given(**SIZES)
def test_statistics_are_those_of_the_tiled_matrix(rows, columns, period, other, rank, seed):
    matrix, expected = draw(rows, columns, period, other, rank, seed)
    mean, variance = matrix.moments()
    torch.testing.assert_close(mean, expected.double().mean(), rtol=1e-5, atol=1e-5)
    if expected.numel() > 1:
        torch.testing.assert_close(variance, expected.double().var(), rtol=1e-4, atol=1e-6)


def test_the_closed_form_deviation_is_exact_to_a_hundred_thousandth():
    matrix, expected = draw(700, 900, 300, 500, 32, 0)
    assert abs(float(matrix.std() / expected.double().std()) - 1) < 1e-5


def test_a_scale_goes_into_the_factor():
    matrix, expected = draw(7, 9, 3, 4, 2, 0)
    torch.testing.assert_close(matrix.scaled(0.25).materialise(), expected * 0.25)


def test_blocks_in_bfloat16_are_the_rounded_matrix():
    matrix, _ = draw(7, 9, 3, 4, 2, 0)
    whole = torch.empty(7, 9, dtype=torch.bfloat16)
    assert torch.equal(matrix.materialise(whole), matrix.materialise().bfloat16())


@pytest.mark.parametrize("block", [10, 10**6])
def test_gradients_reach_both_factors_also_through_the_deviation(monkeypatch, block):
    monkeypatch.setattr(row_chunks, "BLOCK_VALUES", block)
    matrix, _ = draw(7, 9, 3, 4, 2, 0)
    a_PR, b_RQ = matrix.a_PR.requires_grad_(), matrix.b_RQ.requires_grad_()
    matrix = FactoredMatrix(a_PR, b_RQ, 7, 9)
    weight = torch.randn(7, 9, generator=torch.Generator().manual_seed(1))
    (matrix.scaled(1 / matrix.std()).materialise() * weight).sum().backward()
    found = a_PR.grad, b_RQ.grad
    a_PR.grad = b_RQ.grad = None
    whole = (a_PR @ b_RQ)[torch.arange(7) % 3][:, torch.arange(9) % 4]
    (whole / whole.std() * weight).sum().backward()
    torch.testing.assert_close(found, (a_PR.grad, b_RQ.grad))


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"\(3, 2\) and \(4, 5\) do not make a matrix of 6 x 7"):
        FactoredMatrix(torch.ones(3, 2), torch.ones(4, 5), 6, 7)
