"""Modulated norm and gated sum: values and gradients are those of the plain formulas, and little is kept."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mup_dit.fused import gated_sum, modulated_norm

EPS = 1e-6


def leaves(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = ((3, 5, 8), (3, 1, 8), (3, 1, 8), (3, 5, 8))
    return tuple(torch.randn(shape, generator=rng, dtype=dtype).requires_grad_() for shape in shapes)


def plain_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def test_gradients_are_exact():
    x, shift, scale, branch = leaves()
    assert torch.autograd.gradcheck(lambda *inputs: modulated_norm(*inputs, EPS), (x, shift, scale))
    assert torch.autograd.gradcheck(gated_sum, (x, shift, branch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_the_formulas(dtype):
    x, shift, scale, branch = (tensor.detach().to(dtype) for tensor in leaves())
    exact = {torch.float32: 1e-6, torch.bfloat16: 3e-2}[dtype]
    found = modulated_norm(x, shift, scale, EPS)
    assert found.dtype == dtype
    torch.testing.assert_close(found, plain_norm(x, shift, scale), rtol=exact, atol=exact)
    torch.testing.assert_close(gated_sum(x, shift, branch), x + shift * branch, rtol=exact, atol=exact)


def test_under_autocast_products_get_half_precision_and_the_stream_stays():
    x, shift, scale, branch = (tensor.detach().float().requires_grad_() for tensor in leaves())
    with torch.autocast("cpu", torch.bfloat16):
        normed = modulated_norm(x, shift.bfloat16(), scale.bfloat16(), EPS)
        summed = gated_sum(x, shift.bfloat16(), branch.bfloat16())
    assert normed.dtype == torch.bfloat16
    assert summed.dtype == torch.float32
    (normed.float().square().sum() + summed.square().sum()).backward()
    expected = torch.autograd.grad(
        plain_norm(x, shift, scale).square().sum() + (x + shift * branch).square().sum(), (x, shift, scale, branch)
    )
    for leaf, gradient in zip((x, shift, scale, branch), expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=0.05, atol=0.2)


def test_only_the_stream_and_the_scale_are_kept():
    x, shift, scale, _ = (tensor.detach().float().requires_grad_() for tensor in leaves())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        modulated_norm(x, shift, scale, EPS)
    assert sorted(tensor.numel() for tensor in kept) == [scale.numel(), x.numel()]
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in kept)


@pytest.mark.parametrize("masked", [False, True])
def test_short_attention_in_half_precision_is_the_fused_kernels(masked):
    from mup_dit.layers import attend

    rng = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, 7, 8, generator=rng).bfloat16() for _ in range(3))
    mask = (torch.arange(7) < torch.tensor([[7], [4]]))[:, None, None] if masked else None
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, scale=0.3)
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, scale=0.3, mask=mask).float(), exact, rtol=0.05, atol=0.02)
    torch.testing.assert_close(attend(q, k, v, scale=0.3, mask=mask).float(), exact, rtol=0.05, atol=0.02)
