"""The chunked head equals the dense loss and its gradients, and its memory does not grow with the positions."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from common.chunked_loss import chunk_rows, chunked_nll, chunked_weighted_nll
from common.seeding import generator


def make(positions: int, width: int, columns: int, classes: int, seed: int = 0, scale: float = 1.0):
    rng = generator(seed, "chunked loss test")
    hidden = (torch.randn(positions, width, generator=rng) * scale).requires_grad_()
    weight = (torch.randn(columns, width, generator=rng)).requires_grad_()
    bias = torch.randn(columns, generator=rng).requires_grad_()
    target = torch.randint(0, classes, (positions,), generator=rng)
    weights = 10 * torch.rand(positions, generator=rng) ** 3
    return hidden, weight, bias, target, weights


def dense(hidden, weight, bias, target, classes):
    logits = F.linear(hidden, weight[:classes], None if bias is None else bias[:classes])
    return F.cross_entropy(logits, target, reduction="none")


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, [t for t in tensors if t is not None])


@given(
    positions=st.integers(1, 150),
    columns=st.integers(2, 40),
    mask_column=st.booleans(),
    with_bias=st.booleans(),
    chunk_bytes=st.sampled_from([1, 400, 10_000, None]),
    seed=st.integers(0, 1000),
)
def test_both_forms_equal_the_dense_loss_and_gradients(positions, columns, mask_column, with_bias, chunk_bytes, seed):
    classes = columns - mask_column
    hidden, weight, bias, target, weights = make(positions, 6, columns, classes, seed)
    bias = bias if with_bias else None
    options = {"classes": classes, "chunk_bytes": chunk_bytes}
    expected = dense(hidden, weight, bias, target, classes)
    expected_gradients = gradients((expected * weights).sum(), hidden, weight, bias)
    nll = chunked_nll(hidden, weight, bias, target, **options)
    total, detached = chunked_weighted_nll(hidden, weight, bias, target, weights, **options)
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(detached, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, (expected * weights).sum(), rtol=1e-5, atol=1e-4)
    assert not detached.requires_grad
    for got in (gradients((nll * weights).sum(), hidden, weight, bias), gradients(total, hidden, weight, bias)):
        for ours, theirs in zip(got, expected_gradients):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def test_columns_beyond_the_classes_get_no_gradient():
    hidden, weight, bias, target, weights = make(20, 6, 9, 7)
    total, _ = chunked_weighted_nll(hidden, weight, bias, target, weights, classes=7)
    _, weight_gradient, bias_gradient = gradients(total, hidden, weight, bias)
    assert not weight_gradient[7:].any()
    assert not bias_gradient[7:].any()


def test_no_positions_give_a_zero_tied_to_all_operands():
    hidden, weight, bias, target, weights = make(0, 6, 9, 8)
    nll = chunked_nll(hidden, weight, bias, target, classes=8)
    total, _ = chunked_weighted_nll(hidden, weight, bias, target, weights, classes=8)
    assert nll.shape == (0,)
    for zero in (nll.sum(), total):
        assert zero.item() == 0
        assert all(not gradient.any() for gradient in gradients(zero, hidden, weight, bias))


def test_certain_and_impossible_targets_stay_finite_and_exact():
    """Logits of +-200: a probability of the target underflows float32, its logarithm must not."""
    hidden, weight, bias, target, weights = make(30, 6, 9, 9, scale=100.0)
    expected = dense(hidden.double(), weight.double(), bias.double(), target, 9)
    total, nll = chunked_weighted_nll(hidden, weight, bias, target, weights)
    assert expected.max() > 104  # exp(-104) is 0 in float32
    torch.testing.assert_close(nll.double(), expected.detach(), rtol=1e-5, atol=1e-4)
    assert all(gradient.isfinite().all() for gradient in gradients(total, hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_keep_float32_sums_and_large_weights(dtype):
    """Weights of 1e5 would be infinite in float16; the result differs from float32 by rounding of the products only."""
    hidden, weight, bias, target, weights = make(100, 16, 30, 30)
    weights = weights * 1e4
    expected_total, _ = chunked_weighted_nll(hidden, weight, bias, target, weights)
    expected = gradients(expected_total, hidden, weight, bias)
    with torch.autocast("cpu", dtype=dtype):
        total, nll = chunked_weighted_nll(hidden, weight, bias, target, weights, chunk_bytes=2 * 30 * 40)
        separate = chunked_nll(hidden, weight, bias, target, chunk_bytes=2 * 30 * 40)
    assert nll.dtype == total.dtype == separate.dtype == torch.float32
    torch.testing.assert_close(total, expected_total, rtol=2e-2, atol=0)
    torch.testing.assert_close(separate, nll, rtol=1e-6, atol=1e-6)
    for got in (gradients(total, hidden, weight, bias), gradients((separate * weights).sum(), hidden, weight, bias)):
        for ours, theirs in zip(got, expected):
            assert ours.dtype == torch.float32
            assert (ours - theirs).norm() < 2e-2 * theirs.norm()


def test_gradients_equal_finite_differences_in_float64():
    hidden, weight, bias, target, _ = make(7, 3, 6, 5)
    double = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]

    def nll(*operands):
        return chunked_nll(*operands, target, classes=5, chunk_bytes=100)

    assert torch.autograd.gradcheck(nll, double)


def test_without_gradient_nothing_is_kept_and_values_are_equal():
    hidden, weight, bias, target, weights = make(20, 6, 9, 9)
    with torch.no_grad():
        total, nll = chunked_weighted_nll(hidden, weight, bias, target, weights)
    assert total.grad_fn is None
    torch.testing.assert_close(nll, dense(hidden, weight, bias, target, 9).detach(), rtol=1e-5, atol=1e-5)


def test_only_the_input_may_need_a_gradient():
    hidden, weight, bias, target, weights = make(20, 6, 9, 9)
    expected = gradients((dense(hidden, weight, bias, target, 9) * weights).sum(), hidden)
    total, _ = chunked_weighted_nll(hidden, weight.detach(), bias.detach(), target, weights)
    torch.testing.assert_close(gradients(total, hidden), expected, rtol=1e-5, atol=1e-5)


def test_a_second_backward_is_refused_with_a_reason():
    hidden, weight, bias, target, weights = make(5, 6, 9, 9)
    total, _ = chunked_weighted_nll(hidden, weight, bias, target, weights)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        total.backward()


def test_chunks_are_equal_and_within_the_budget():
    cpu = torch.device("cpu")
    rows = chunk_rows(1000, 50_257, cpu, torch.float32, 128 * 2**20)
    assert rows == 500  # two chunks of 100 MB rather than 667 + 333
    assert chunk_rows(1000, 50_257, cpu, torch.bfloat16, 128 * 2**20) == 1000
    assert chunk_rows(0, 10, cpu, torch.float32) == 1
    assert chunk_rows(10, 10**9, cpu, torch.float32) == 1


MEMORY = """
import sys
from pathlib import Path
import torch
from common.chunked_loss import chunked_weighted_nll

def megabytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

positions, columns, width = int(sys.argv[1]), 20000, 16
torch.set_num_threads(1)
hidden = torch.randn(positions, width, requires_grad=True)
weight = torch.randn(columns, width, requires_grad=True)
bias = torch.zeros(columns, requires_grad=True)
target = torch.randint(0, columns, (positions,))
for count in (8, positions):  # a small call first: the kernels' own buffers
    before = megabytes("VmRSS")
    total, _ = chunked_weighted_nll(
        hidden[:count], weight, bias, target[:count], torch.ones(count), chunk_bytes=16 * 2**20
    )
    total.backward()
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_grow_with_positions_times_columns(repo_root):
    """2,048 positions of 20,000 columns are 164 MB of logits in float32; a budget of 16 MB must hold for them."""
    output = subprocess.run(
        [sys.executable, "-c", MEMORY, "2048"], cwd=repo_root, capture_output=True, text=True, check=True
    ).stdout
    assert float(output) < 60
