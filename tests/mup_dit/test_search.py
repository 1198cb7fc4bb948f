"""Random search: trials are reproducible and independent of each other, and the report finds what mattered."""

import math

import pytest

from common.errors import ConfigError, DataError
from mup_dit.search import SearchConfig, draw_trial, report_search
from mup_dit.sweep import ArmResult

SEARCH = SearchConfig(repa_weight=(0.1, 1.0))


def trial(index: int, loss: float | None = None, **settings: float) -> ArmResult:
    drawn = {**draw_trial(SEARCH, 0, index), **settings}
    # the learning rate decides: best at 2^-7
    value = 0.1 + 0.01 * (drawn["loglr"] + 7) ** 2 if loss is None else loss
    return ArmResult(
        width=512,
        loglr=drawn["loglr"],
        seed=0,
        loss=value,
        steps=10,
        planned_steps=10,
        batch_size=8,
        parameters=100,
        settings=drawn,
    )


def test_trial_depends_on_seed_and_number_alone():
    assert draw_trial(SEARCH, 0, 5) == draw_trial(SEARCH, 0, 5)
    assert draw_trial(SEARCH, 0, 5) != draw_trial(SEARCH, 0, 6)
    assert draw_trial(SEARCH, 0, 5) != draw_trial(SEARCH, 1, 5)


def test_leaving_an_option_alone_does_not_change_the_others():
    without = draw_trial(SearchConfig(grad_clip=(), repa_weight=(0.1, 1.0)), 0, 5)
    with_all = draw_trial(SEARCH, 0, 5)
    assert "grad_clip" not in without
    assert without == {name: value for name, value in with_all.items() if name != "grad_clip"}


def test_draws_cover_their_ranges():
    drawn = [draw_trial(SEARCH, 0, index) for index in range(200)]
    rates = [values["loglr"] for values in drawn]
    assert -11 <= min(rates) < -10.5
    assert -5.5 < max(rates) <= -5
    assert {values["grad_clip"] for values in drawn} == set(SEARCH.grad_clip)
    assert {values["warmup"] for values in drawn} == set(SEARCH.warmup)
    below = sum(values["repa_weight"] < math.sqrt(0.1) for values in drawn)  # log-uniform: half below the middle
    assert 70 < below < 130


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("loglr", (-5.0, -9.0)),
        ("loglr", (-5.0,)),
        ("repa_weight", (0.0, 1.0)),
        ("grad_clip", (0.0,)),
        ("warmup", (2.0,)),
    ],
)
def test_ranges_that_cannot_work_are_named(option: str, value: tuple):
    with pytest.raises(ConfigError, match=f"search.{option}="):
        SearchConfig(**{option: value})
    with pytest.raises(ConfigError, match="trial"):
        draw_trial(SEARCH, 0, -1)


def test_report_finds_the_option_that_mattered():
    results = [trial(index) for index in range(60)]
    found = report_search(results)
    assert found.best.loss == min(result.loss for result in results)
    assert abs(found.medians["loglr"] + 7) < 1
    assert found.importance["loglr"] > 0.9
    assert max(abs(found.importance[name]) for name in ("grad_clip", "repa_weight", "warmup")) < 0.5
    summary, by_value = found.tables
    assert {row[0] for row in summary.rows} == {"loglr", "grad_clip", "repa_weight", "warmup"}
    assert sum(row[2] for row in by_value.rows if row[0] == "loglr") == 60
    assert len([row for row in by_value.rows if row[0] == "grad_clip"]) == len(SEARCH.grad_clip)


def test_diverged_trials_rank_last_and_never_win():
    results = [trial(0, loss=math.inf), trial(1, loss=0.2), trial(2, loss=0.3)]
    assert report_search(results).best.loss == 0.2
    assert "1 of them diverged" in report_search(results).tables[0].caption
    with pytest.raises(DataError, match="none of 1 trials"):
        report_search(results[:1])
