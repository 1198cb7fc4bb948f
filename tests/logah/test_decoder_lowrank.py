"""The low-rank decoder: what is sliced equals what is decoded whole, at every published size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logah.decoder_lowrank import A, B, LowRankDecoder, Read

RANKS = {"tiny": 32, "small": 90, "base": 128, "large": 256}
K = 32768
REQUESTS = [
    ((768, 768, 1, 1), "4d"),
    ((1280, 96, 1, 1), "4d"),
    ((24, 5, 3, 2), "4d"),
    ((1, 64, 14, 14), "4d"),
    ((100, 384, 1, 1), "class"),
    ((4096, 1, 1, 1), "1d"),
    ((K, 2, 1, 1), "4d"),
    ((3, K, 1, 1), "class"),
    ((K, 1, 1, 1), "1d"),
]


def filled(hid: int, rank: int, max_ck: int) -> LowRankDecoder:
    """Values of either sign, alike in scale and different everywhere."""
    with torch.device("meta"):
        decoder = LowRankDecoder(hid, rank, max_ck)
    decoder.to_empty(device="cpu")
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in decoder.parameters():
            fan_in = parameter.shape[1] if parameter.dim() > 1 else 16
            parameter.uniform_(-1, 1, generator=rng).mul_((3 / fan_in) ** 0.5)
    return decoder.eval()


@torch.no_grad()
@pytest.mark.parametrize("size", RANKS)
def test_sliced_equals_full_at_the_published_ranks(size: str):
    decoder = filled(4, RANKS[size], K)  # the width of the encoder has no part in what is sliced
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(1))
    both = decoder.seq(decoder.mlp.fc(x).view(2 * decoder.rank, decoder.rank)).view(2 * K, decoder.rank)
    for request, kind in REQUESTS:
        outputs, inputs, height, width = request
        whole = both[: outputs * height] @ both[K : K + inputs * width].T
        sliced = decoder(x, request, kind)[0]
        if kind == "4d":
            sliced = sliced.transpose(1, 2).reshape(whole.shape)
        error = (sliced.reshape(whole.shape) - whole).abs().max() / whole.abs().max()
        assert error < 1e-6, (request, kind)
    if size == "tiny":
        full = decoder.full(x, REQUESTS[2][0])
        assert torch.allclose(decoder(x, REQUESTS[2][0]), full, atol=1e-6 * float(full.abs().max()))


@torch.no_grad()
def test_sliced_equals_full_where_rows_of_the_list_span_several_rows_of_h():
    decoder = filled(16, 8, 24)  # K / r = 3: every third row of a factor begins a new row of H
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    for outputs in (1, 2, 3, 4, 7, 23, 24):
        for inputs in (1, 3, 10, 24):
            request = (outputs, inputs, 1, 1)
            assert torch.allclose(decoder(x, request), decoder.full(x, request), atol=1e-6), request


@torch.no_grad()
@settings(max_examples=30)
@given(rank=st.integers(1, 9), rows=st.integers(1, 40), data=st.data())
def test_any_rows_of_a_factor_can_be_read_alone(rank: int, rows: int, data):
    decoder = filled(8, rank, 40)
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(2))
    start = data.draw(st.integers(0, rows - 1))
    whole = decoder.seq(decoder.mlp.fc(x).view(-1, 2 * rank, rank)).reshape(2, 80, rank)
    trunk = decoder.trunk(x)
    for factor, first in ((A, 0), (B, 40)):
        found = decoder.read(trunk, Read(factor, start, rows))
        assert torch.allclose(found, whole[:, first + start : first + rows], atol=1e-6)


@torch.no_grad()
def test_requests_beyond_k_give_k_rows_as_released():
    decoder = filled(8, 4, 40)
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(2))
    assert decoder(x, (49, 3, 1, 1), "class").shape == (1, 40, 3)


@torch.no_grad()
def test_matrices_have_at_most_the_rank():
    decoder = filled(16, 4, 64)
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(3))
    matrix = decoder(x, (30, 20, 1, 1))[0, :, :, 0, 0].double()
    singular = torch.linalg.svdvals(matrix)
    assert singular[3] > 1e-4 * singular[0] and (singular[4:] < 1e-5 * singular[0]).all()


@torch.no_grad()
def test_a_larger_request_begins_with_the_smaller_one():
    decoder = filled(16, 4, 64)
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
    large, small = decoder(x, (32, 16, 1, 1)), decoder(x, (24, 12, 1, 1))
    assert torch.allclose(large[:, :24, :12], small, atol=1e-6)


def test_slicing_leaves_the_same_gradients():
    found = []
    for method in ("forward", "full"):
        decoder = filled(16, 8, 24)
        x = torch.randn(2, 16, generator=torch.Generator().manual_seed(4)).requires_grad_()
        y = getattr(decoder, method)(x, (13, 5, 1, 1), "4d")
        (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
        found.append([x.grad, *(p.grad for name, p in decoder.named_parameters() if not name.startswith("l1."))])
        assert decoder.l1.weight.grad is None  # never used
    for sliced, full in zip(*found, strict=True):
        assert torch.allclose(sliced, full, atol=1e-3 * float(full.abs().max()))
