"""Every golden case of the adapted models, with eager and with sdpa attention."""

import pytest

from common.testing.golden import load_cases
from tests.diffullama import golden_adapter


def pytest_generate_tests(metafunc):
    if "case_name" in metafunc.fixturenames:
        metafunc.parametrize("case_name", load_cases("diffullama", metafunc.config.getoption("--golden")))


@pytest.fixture(scope="module")
def cases(golden_dir):
    return load_cases("diffullama", golden_dir)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_case_agrees_with_the_reference(case_name, implementation, cases):
    case = cases[case_name]
    outputs = golden_adapter.run(case_name, case.raw, case.inputs, implementation)
    for name in case.outputs:
        assert name in outputs, f"{case_name}: {name} is not computed"
        case.check(name, outputs[name])
    for name, expected in case.raw.get("outputs", {}).items():  # cases of text
        assert name in outputs, f"{case_name}: {name} is not computed"
        assert agrees(outputs[name], expected, case.raw["tolerance"]), f"{case_name}: {name} is {outputs[name]}"


def agrees(found: object, expected: object, tolerance: float) -> bool:
    if isinstance(expected, list):
        pairs = zip(found, expected, strict=False)
        return len(found) == len(expected) and all(agrees(*pair, tolerance) for pair in pairs)
    if isinstance(expected, int | float):
        return abs(found - expected) <= tolerance
    return found == expected


def test_a_case_of_unknown_kind_is_named():
    with pytest.raises(KeyError, match="unheard_of"):
        golden_adapter.run("unheard_of", {}, {})
