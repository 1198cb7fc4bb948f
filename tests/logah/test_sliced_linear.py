"""Products with slices of one weight equal those that autograd takes apart itself."""

import torch
from torch.nn import functional as F

from logah.sliced_linear import sliced_linear

SLICES = [slice(0, 3), slice(2, 7), slice(0, 7), slice(5, 6)]


def tensors() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    shapes = [(2, 4), (3, 5, 4), (1, 4), (2, 4)]
    made = [
        torch.randn(shape, generator=rng, dtype=torch.float64, requires_grad=True) for shape in [(7, 4), (7,), *shapes]
    ]
    return made[0], made[1], made[2:]


def test_outputs_and_gradients_are_those_of_plain_slices():
    weight, bias, inputs = tensors()
    plain = [F.linear(x, weight[part], bias[part]) for x, part in zip(inputs, SLICES, strict=True)]
    ours = sliced_linear(inputs, weight, bias, SLICES)
    leaves = [weight, bias, *inputs]
    expected = torch.autograd.grad(sum((y**2).sum() for y in plain), leaves)
    found = torch.autograd.grad(sum((y**2).sum() for y in ours), leaves)
    for a, b in zip([*ours, *found], [*plain, *expected], strict=True):
        torch.testing.assert_close(a, b)


def test_an_output_that_nothing_uses_has_no_gradient():
    weight, bias, inputs = tensors()
    sliced_linear(inputs, weight, bias, SLICES)[1].sum().backward()
    assert inputs[0].grad is None or not inputs[0].grad.any()
    assert not weight.grad[:2].any() and weight.grad[2:7].any()
