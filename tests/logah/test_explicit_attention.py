"""Attention with a visible softmax."""

import pytest
import torch
import torch.nn.functional as F

from logah.explicit_attention import explicit_attention, visible_softmax


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": "bool"}, {"attn_mask": "float"}]
)
def test_explicit_formula_equals_the_fused_kernel(options):
    rng = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 3, 5, 4, generator=rng) for _ in range(3))
    if options.get("attn_mask") == "bool":
        options = {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()}
    elif options.get("attn_mask") == "float":
        options = {"attn_mask": torch.randn(5, 5, generator=rng)}
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(explicit_attention(query, key, value, **options), expected)


def test_grouped_keys_are_repeated():
    rng = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(2, heads, 5, 4, generator=rng) for heads in (4, 2, 2))
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(explicit_attention(query, key, value, enable_gqa=True), expected)


def test_the_fused_kernel_is_back_after_an_error():
    fused = F.scaled_dot_product_attention

    def failing_trace():
        with visible_softmax():
            assert F.scaled_dot_product_attention is explicit_attention
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        failing_trace()
    assert F.scaled_dot_product_attention is fused
