"""Every golden case of the RPG."""

import math

import pytest

from common.testing.golden import load_cases
from tests.rpg import golden_adapter


def pytest_generate_tests(metafunc):
    if "case_name" in metafunc.fixturenames:
        metafunc.parametrize("case_name", load_cases("rpg", metafunc.config.getoption("--golden")))


@pytest.fixture(scope="module")
def cases(golden_dir):
    return load_cases("rpg", golden_dir)


def test_case_agrees_with_the_reference(case_name, cases):
    case = cases[case_name]
    outputs = golden_adapter.run(case_name, case.raw, case.inputs)
    compared = 0
    for name in case.outputs:
        assert name in outputs, f"{case_name}: {name} is not computed"
        case.check(name, outputs[name])
        compared += 1
    for name in outputs.keys() - case.outputs.keys():
        if name in case.raw:
            assert_agrees(outputs[name], case.raw[name], f"{case_name}.{name}")
            compared += 1
    assert compared, f"{case_name}: nothing was compared"


def assert_agrees(found: object, expected: object, where: str) -> None:
    """Equal up to rounding; a mapping may leave out what describes a case rather than results from it."""
    if isinstance(found, dict):
        for key, value in found.items():
            assert key in expected, f"{where}: {key} is no key of the case"
            assert_agrees(value, expected[key], f"{where}.{key}")
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected), f"{where}: {len(found)} entries, expected {len(expected)}"
        for index, (value, wanted) in enumerate(zip(found, expected, strict=True)):
            assert_agrees(value, wanted, f"{where}[{index}]")
    elif isinstance(found, float) and expected is not None:
        assert math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-6), f"{where}: {found}, expected {expected}"
    else:
        assert found == expected, f"{where}: {found!r}, expected {expected!r}"


def test_a_case_of_unknown_kind_is_named():
    with pytest.raises(KeyError, match="unheard_of"):
        golden_adapter.run("unheard_of", {}, {})
