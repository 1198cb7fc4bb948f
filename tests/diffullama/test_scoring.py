"""Scores of continuations: what is estimated, batches, common random numbers, the baseline, mistakes."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from common.errors import ConfigError, DataError
from diffullama.scoring import ChoiceItem, ScoringRule, causal_items, causal_scores, choice_scores, score_items
from tests.diffullama.tiny_models import MASK, rows, tiny_lm

PREFIX = [3, 17, 5, 9]
CONTINUATIONS = [[1, 2, 30, 4, 5, 6, 7], [8, 9], [11, 12, 13], [14]]


def exact_bound(model, prefix, continuation) -> float:
    """NELBO per token of the continuation by all masks: the mean over counts k of the mean loss of k masked tokens."""
    length, x_1L = len(continuation), torch.tensor([[*prefix, *continuation]])
    total = 0.0
    for count in range(1, length + 1):
        losses = []
        for subset in itertools.combinations(range(length), count):
            where = torch.zeros_like(x_1L, dtype=torch.bool)
            where[0, [len(prefix) + position for position in subset]] = True
            with torch.no_grad():
                losses.append(float(model(x_1L.masked_fill(where, model.mask_id), x_1L, where).mean()))
        total += sum(losses) / len(losses)
    return total / length


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_counts_with_enough_rows_is_the_exact_bound_per_token(family):
    model = tiny_lm(family)
    found = choice_scores(model, PREFIX, CONTINUATIONS, 127, estimator="counts")
    expected = [exact_bound(model, PREFIX, continuation) for continuation in CONTINUATIONS]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("estimator", ["stratified", "counts"])
def test_estimators_are_unbiased_and_the_reference_favours_short_continuations(estimator):
    model, continuations = tiny_lm(), [[1, 2, 30, 4, 5, 6], [8, 9], [14]]
    rule = ScoringRule(estimator=estimator, levels=8, samples=250)
    (found,) = score_items(model, [ChoiceItem(PREFIX, continuations)], rule, keys=[0], batch_size=512)
    expected = torch.tensor([exact_bound(model, PREFIX, tokens) for tokens in continuations], dtype=torch.float64)
    error = found.value_MC.std(dim=0) / len(found.value_MC) ** 0.5
    assert bool(((found.scores_C - expected).abs() <= 4 * error + 1e-5 * expected).all())
    reference = choice_scores(model, PREFIX, continuations, 8, samples=250, batch_size=512)
    # a single token is masked with probability (T + 1) / 2T on average over the levels
    assert float(reference[2] / expected[2]) == pytest.approx(9 / 16, abs=0.06)


def test_counts_varies_least_for_equal_network_rows():
    model, continuation = tiny_lm(), [list(range(1, 21))]
    spread = {}
    for estimator in ("reference", "stratified", "counts"):
        values = [
            choice_scores(model, PREFIX, continuation, 16, estimator=estimator, seed=seed)[0].item()
            for seed in range(30)
        ]
        spread[estimator] = torch.tensor(values).std().item()
    assert spread["counts"] < min(spread["reference"], spread["stratified"])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("estimator", ["reference", "counts"])
def test_scores_do_not_depend_on_the_batch_or_on_the_other_items(estimator, implementation, family):
    model = tiny_lm(family, implementation=implementation)
    items = [ChoiceItem(PREFIX[: 2 + n % 3], CONTINUATIONS[n % 3 :]) for n in range(5)]
    rule = ScoringRule(estimator=estimator, levels=6, samples=2)
    together = score_items(model, items, rule, keys=range(5), seed=1, batch_size=200)
    small = score_items(model, items, rule, keys=range(5), seed=1, batch_size=3)
    for key, (item, one, other) in enumerate(zip(items, together, small, strict=True)):
        (alone,) = score_items(model, [item], rule, keys=[key], seed=1, batch_size=64)
        assert other.value_MC.flatten().tolist() == pytest.approx(one.value_MC.flatten().tolist(), rel=1e-5)
        assert alone.value_MC.flatten().tolist() == pytest.approx(one.value_MC.flatten().tolist(), rel=1e-5)
    assert not torch.equal(together[0].value_MC, score_items(model, items[:1], rule, keys=[7], seed=1)[0].value_MC)


def test_masks_are_common_to_the_continuations_and_aligned_at_their_ends():
    """Continuations that differ in their first token only are compared under the same masks: equal ones tie exactly."""
    model = tiny_lm()
    rule = ScoringRule(estimator="counts", levels=8, samples=4)
    ending = list(range(1, 15))
    item = ChoiceItem(PREFIX, [[20, *ending], [20, *ending], [21, *ending]])
    (found,) = score_items(model, [item], rule, keys=[0])
    assert torch.equal(found.value_MC[:, 0], found.value_MC[:, 1])
    difference = found.value_MC[:, 2] - found.value_MC[:, 0]
    independent = torch.stack(
        [score_items(model, [ChoiceItem(PREFIX, item.continuations[2:])], rule, keys=[9])[0].value_MC[:, 0],
         found.value_MC[:, 0]]
    )  # fmt: skip
    assert float(difference.std()) < float((independent[0] - independent[1]).std())
    u = torch.rand(5, 15, generator=torch.Generator().manual_seed(0))
    shared = choice_scores(model, PREFIX, [[20, *ending], ending], 5, u=u)
    apart = choice_scores(model, PREFIX, [[20, *ending], ending], 5, u=[u, u[:, 1:]])
    assert torch.equal(shared, apart)


def test_by_id_also_counts_clean_masks():
    model = tiny_lm()
    u = torch.ones(4, 3) - 1e-6  # masks nothing below rate 1
    plain = choice_scores(model, [1, MASK, 2], [[3, 4, 5]], 4, u=u, by_id=False)
    by_id = choice_scores(model, [1, MASK, 2], [[3, 4, 5]], 4, u=u, by_id=True)
    assert float(by_id) > float(plain) > 0


def test_margin_is_that_of_the_two_best_with_its_paired_error():
    (found,) = score_items(tiny_lm(), [ChoiceItem(PREFIX, CONTINUATIONS)], ScoringRule(levels=4, samples=4), keys=[0])
    ordered = found.scores_C.sort()
    margin, error = found.margin()
    assert found.best == int(ordered.indices[0])
    assert margin == pytest.approx(float(ordered.values[1] - ordered.values[0]))
    assert error >= 0
    single = score_items(tiny_lm(), [ChoiceItem(PREFIX, [[1]])], ScoringRule(), keys=[0])[0]
    assert single.margin() == (float("inf"), None)


# ---------------------------------------------------------------- the baseline


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("shift", [True, False])
def test_causal_scores_are_the_parents_likelihoods(family, shift):
    model = tiny_lm(family, shift=shift)
    expected = []
    for continuation in CONTINUATIONS:
        x_1L = torch.tensor([[*PREFIX, *continuation]])
        with torch.no_grad():
            logits = model(x_1L, causal=True)[0, len(PREFIX) - 1 : -1]
        expected.append(-float(F.cross_entropy(logits, x_1L[0, len(PREFIX) :], reduction="sum")))
    assert causal_scores(model, PREFIX, CONTINUATIONS, "sum").tolist() == pytest.approx(expected, rel=1e-5)
    means = [value / len(tokens) for value, tokens in zip(expected, CONTINUATIONS, strict=True)]
    assert causal_scores(model, PREFIX, CONTINUATIONS, "mean", batch_size=1).tolist() == pytest.approx(means, rel=1e-5)


def test_causal_items_keep_items_apart():
    model = tiny_lm()
    items = [ChoiceItem(PREFIX, CONTINUATIONS), ChoiceItem([1], [[2, 3], [4]])]
    found = causal_items(model, items, "mean")
    assert (-found[1].scores_C).tolist() == pytest.approx(causal_scores(model, [1], [[2, 3], [4]]).tolist())
    assert found[0].value_MC.shape == (1, 4)


# ---------------------------------------------------------------- mistakes


def test_unusable_items_and_options_are_named():
    model = tiny_lm(positions=8)
    for prefix, continuations, message in [
        ([], [[1]], "empty prefix"),
        ([1], [[2], []], "an empty one"),
        ([1], [], "no continuation"),
        ([1] * 6, [[1, 2, 3]], "9 tokens, but the model 8 positions"),
    ]:
        with pytest.raises(DataError, match=message):
            choice_scores(model, prefix, continuations, 2)
    with pytest.raises(ConfigError, match=r"scoring.estimator='best' is not known"):
        ScoringRule(estimator="best")
    with pytest.raises(ConfigError, match=r"u has shape \(3, 1\), but 4 levels and a continuation of 2 tokens"):
        choice_scores(model, [1], [[2, 3]], 4, u=torch.rand(3, 1))
    with pytest.raises(ConfigError, match="counts draws orders"):
        choice_scores(model, [1], [[2, 3]], 4, u=torch.rand(4, 2), estimator="counts")
    with pytest.raises(DataError, match="empty prefix"):
        causal_scores(tiny_lm(shift=False), [], [[1]])


def test_a_model_without_shift_scores_an_empty_prefix():
    assert bool(torch.isfinite(choice_scores(tiny_lm(shift=False), [], rows(2, 5).tolist(), 4)).all())
