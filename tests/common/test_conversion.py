"""Composed options become typed dataclasses, or one message that names the option, the value and what fits."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from common.conversion import MISSING, from_config, nearest, option_names, unknown_option
from common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Part:
    rate: float = 1e-3
    count: int | None = None
    kind: Literal["fast", "exact"] = "fast"


@dataclass(frozen=True, kw_only=True)
class Whole:
    name: str
    part: Part = field(default_factory=Part)
    maybe: Part | None = None
    sizes: tuple[int, ...] = ()
    pair: tuple[int, str] = (0, "a")
    words: list[str] = field(default_factory=list)
    folder: Path | None = None
    on: bool = False
    either: int | str = 0
    table: dict[str, float] = field(default_factory=dict)
    anything: Any = None


def test_nested_values_arrive_with_their_types():
    composed = OmegaConf.create(
        {
            "name": 2024,
            "part": {"rate": "1e-4", "count": 5, "kind": "exact"},
            "maybe": {"rate": 3},
            "sizes": [1, 2.0, "3"],
            "pair": [1, "b"],
            "words": ["x"],
            "folder": "runs/first",
            "on": True,
            "either": "1",
            "table": {"a": 1},
        }
    )
    got = from_config(Whole, composed)
    assert got == Whole(
        name="2024",
        part=Part(rate=1e-4, count=5, kind="exact"),
        maybe=Part(rate=3.0),
        sizes=(1, 2, 3),
        pair=(1, "b"),
        words=["x"],
        folder=Path("runs/first"),
        on=True,
        either="1",
        table={"a": 1.0},
    )
    assert type(got.maybe.rate) is float
    assert from_config(Whole, got) is got


@given(
    rate=st.floats(allow_nan=False, allow_infinity=False),
    count=st.none() | st.integers(-(2**70), 2**70),
    kind=st.sampled_from(["fast", "exact"]),
    name=st.text(max_size=8).filter(lambda text: text != MISSING),
    sizes=st.lists(st.integers(), max_size=4),
    on=st.booleans(),
)
def test_a_configuration_survives_the_round_trip(rate, count, kind, name, sizes, on):
    whole = Whole(name=name, part=Part(rate=rate, count=count, kind=kind), sizes=tuple(sizes), on=on)
    assert from_config(Whole, asdict(whole)) == whole


@pytest.mark.parametrize(
    "values,message",
    [
        ({}, r"^name has no value and no default; add name="),
        ({"name": "???"}, r"^name has no value"),
        ({"name": "a", "part": {"rte": 1}}, r"^part\.rte is not an option; did you mean part\.rate\?"),
        ({"name": "a", "parts": {}}, r"^parts is not an option; did you mean part\?"),
        ({"name": "a", "part": {"rate": "fast"}}, r"^part\.rate='fast' must be a number\."),
        ({"name": "a", "part": {"rate": None}}, r"^part\.rate=null must be a number\."),
        ({"name": "a", "part": {"rate": True}}, r"^part\.rate=True must be a number\."),
        ({"name": "a", "part": {"count": 1.5}}, r"^part\.count=1\.5 must be a whole number \(or null\)\."),
        ({"name": "a", "part": {"count": "inf"}}, r"^part\.count='inf' must be a whole number"),
        (
            {"name": "a", "part": {"kind": "fst"}},
            r"^part\.kind='fst' is not known; .*fast, exact\. Did you mean 'fast'",
        ),
        ({"name": "a", "part": 3}, r"^part=3 is not a group of options; set its parts, for example part\.rate="),
        ({"name": "a", "part": None}, r"^part=None is not a group"),
        ({"name": "a", "on": 1}, r"^on=1 must be true or false"),
        ({"name": "a", "on": "yes"}, r"^on='yes' must be true or false"),
        ({"name": True}, r"^name=True must be text"),
        ({"name": "a", "sizes": 3}, r"^sizes=3 must be a list, for example 'sizes=\[3\]'"),
        ({"name": "a", "sizes": [1, "b"]}, r"^sizes\[1\]='b' must be a whole number"),
        ({"name": "a", "pair": [1]}, r"^pair=\[1\] must have 2 entries, it has 1"),
        ({"name": "a", "either": None}, r"^either=None must be a whole number or text"),
        ({"name": "a", "table": {"k": "x"}}, r"^table\.k='x' must be a number"),
        ({"name": "a", "table": [1]}, r"^table=\[1\] must be a mapping"),
        ({"name": "a", "folder": 3}, r"^folder=3 must be a path \(or null\)"),
        ({"name": "a", "maybe": {"count": "x"}}, r"^maybe\.count='x' must be a whole number"),
    ],
)
def test_what_does_not_fit_is_named(values: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        from_config(Whole, values)


def test_numbers_written_with_an_exponent_are_accepted_as_text():
    # plain YAML reads 1e-4 as a string
    assert from_config(Part, {"rate": "1e-4", "count": "1e6"}) == Part(rate=1e-4, count=1_000_000)


def test_large_integers_keep_every_digit():
    assert from_config(Part, {"count": 2**63 - 1}).count == 2**63 - 1


def test_option_names_reach_into_optional_parts():
    assert {"part", "part.rate", "maybe.kind", "sizes"} <= set(option_names(Whole))


@pytest.mark.parametrize(
    "typed,meant",
    [
        ("optim.lrr", "optim.lr"),
        ("lr", "optim.lr"),
        ("training.lr", "optim.lr"),
        ("Optim.LR", "optim.lr"),
        ("wamup", "optim.warmup"),
    ],
)
def test_the_nearest_option_is_offered(typed: str, meant: str):
    names = ["optim", "optim.lr", "optim.warmup", "training", "training.ema", "seed"]
    assert f"did you mean {meant}?" in unknown_option(typed, names)


def test_nothing_is_offered_for_nonsense():
    assert unknown_option("qqqq", ["seed"]).endswith("--cfg job shows all options.")
    assert nearest("qqqq", ["seed"]) == []
