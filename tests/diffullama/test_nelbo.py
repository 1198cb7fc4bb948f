"""Bounds: uniform logits, agreement of the estimators, exactness, blocks with given tokens, spans."""

import math

import pytest
import torch
from torch.nn import functional as F

from common.errors import DataError
from diffullama.nelbo import Span, causal_nats, group_bound, nelbo, span_nll, time_replicates
from tests.diffullama.test_scoring import exact_bound
from tests.diffullama.tiny_models import VOCAB, rows, tiny_lm


@pytest.mark.parametrize("estimator", ["time", "count"])
@pytest.mark.parametrize("shift", [True, False])
def test_uniform_logits_give_ln_v_per_token(estimator, shift):
    model = tiny_lm(shift=shift)
    with torch.no_grad():
        model.hf.lm_head.weight.zero_()
    mean, error = nelbo(model, rows(64, 60), estimator, draws=64, batch_size=256)
    assert mean == pytest.approx(math.log(VOCAB), rel=0.01)
    assert abs(mean - math.log(VOCAB)) <= 4 * error + 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_both_estimators_agree_with_the_bound_by_enumeration(family):
    model, x = tiny_lm(family), rows(6, 7)
    exact = sum(exact_bound(model, row[:1], row[1:]) for row in x.tolist()) / len(x)
    values = {}
    for estimator in ("time", "count"):
        values[estimator] = nelbo(model, x, estimator, draws=400, batch_size=512, seed=2)
        assert abs(values[estimator].value - exact) <= 3 * values[estimator].standard_error
    assert values["count"].standard_error < values["time"].standard_error


def test_the_bound_depends_neither_on_the_batch_nor_on_other_groups():
    model, x = tiny_lm(), rows(20, 9)
    whole = nelbo(model, x, draws=4, batch_size=64)
    assert nelbo(model, x, draws=4, batch_size=3).value == pytest.approx(whole.value, rel=1e-5)
    second = group_bound(model, x[16:], 16, estimator="count", draws=4, seed=0, batch_size=64)
    assert whole.bound.nats_per_token.value * 20 * 8 == pytest.approx(
        sum(second.nats) + sum(group_bound(model, x[:16], 0, estimator="count", draws=4, seed=0, batch_size=64).nats),
        rel=1e-6,
    )
    assert nelbo(model, x, draws=4, seed=1).value != whole.value
    assert whole.bound.tokens == 20 * 8


def test_given_tokens_are_never_masked_and_not_counted():
    for replicate in time_replicates(0, 16, 12, draws=5, seed=0, given=3):
        assert not replicate.masked_RL[:, :3].any() and not replicate.weight_RL[:, :3].any()
    metric = nelbo(tiny_lm(), rows(4, 12), draws=4, given=5)
    assert metric.bound.tokens == 4 * 7
    with pytest.raises(DataError, match="given=0"):
        nelbo(tiny_lm(), rows(4, 12), given=0)
    with pytest.raises(DataError, match="no token to score"):
        nelbo(tiny_lm(), rows(4, 1))


def test_a_single_draw_has_no_standard_error():
    mean, error = nelbo(tiny_lm(), rows(4, 12), draws=1)
    assert mean > 0 and error is None


def test_causal_nats_are_the_parents():
    model, x = tiny_lm(), rows(3, 8)
    with torch.no_grad():
        logits = model(x, causal=True)[:, :-1]
    expected = F.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none").sum(dim=1)
    assert causal_nats(model, x, batch_size=2) == pytest.approx(expected.tolist(), rel=1e-5)


def test_a_spans_losses_see_the_suffix_or_not():
    model, x = tiny_lm(), rows(5, 12)
    span = Span.middle(12, 4)
    assert (span.start, span.length) == (4, 4)
    other = x.clone()
    other[:, 8:] = (other[:, 8:] + 1) % (VOCAB - 1)
    first, second = span_nll(model, x, span, batch_size=2), span_nll(model, other, span)
    assert first["without_suffix"] == pytest.approx(second["without_suffix"], rel=1e-5)
    assert first["with_suffix"] != pytest.approx(second["with_suffix"], rel=1e-5)
    with pytest.raises(DataError, match="does not fit"):
        Span.middle(8, 8)
