"""Continuing by the parent: the cache changes nothing, rows keep their random numbers, stopping."""

import pytest
import torch

from common.diffusion.categorical import TokenDraw
from common.errors import ConfigError
from diffullama.autoregressive import continue_causally
from tests.diffullama.tiny_models import rows, tiny_lm


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("bidirectional_config", [True, False])
def test_greedy_continuation_equals_recomputation_without_a_cache(family, bidirectional_config):
    model = tiny_lm(family)
    if bidirectional_config:
        model.config.is_causal = False  # as saved by an adapted model
    prefix = rows(3, 5)
    found = continue_causally(model, prefix, 8)
    tokens = prefix
    for _ in range(8):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens, causal=True)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, tokens[:, 5:])


def test_sampled_rows_depend_on_their_number_only():
    model, prefix = tiny_lm(), rows(4, 3)
    draw = TokenDraw(temperature=1.5)
    together = continue_causally(model, prefix, 6, draw=draw, seed=1)
    alone = continue_causally(model, prefix[2:3], 6, draw=draw, seed=1, rows=[2])
    assert torch.equal(together[2:3], alone)
    assert not torch.equal(together, continue_causally(model, prefix, 6, draw=draw, seed=2))


def test_a_row_ends_at_its_stop_token_and_keeps_it():
    model, prefix = tiny_lm(), rows(4, 3)
    free = continue_causally(model, prefix, 8)
    stop = int(free[0, 2])
    found = continue_causally(model, prefix, 8, stop_id=stop)
    for row, whole in zip(found.tolist(), free.tolist(), strict=True):
        end = whole.index(stop) if stop in whole else 8
        assert row == whole[:end] + [stop] * (8 - end)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="has 64 positions"):
        continue_causally(tiny_lm(), rows(1, 60), 5)
    with pytest.raises(ConfigError, match="at least 1"):
        continue_causally(tiny_lm(), rows(1, 0), 5)
