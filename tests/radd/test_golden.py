"""Every golden case of RADD through the adapter: the reference's numbers within the stated tolerance."""

import pytest

from common.testing.golden import load_cases
from tests.radd import golden_adapter


def pytest_generate_tests(metafunc):
    if "case_name" in metafunc.fixturenames:
        metafunc.parametrize("case_name", load_cases("radd", metafunc.config.getoption("--golden")))


@pytest.fixture(scope="module")
def cases(golden_dir):
    return load_cases("radd", golden_dir)


def test_case_agrees_with_the_reference(case_name, cases):
    case = cases[case_name]
    outputs = golden_adapter.run(case_name, case.raw, case.inputs)
    for name in case.outputs:
        assert name in outputs, f"{case_name}: {name} is not computed"
        case.check(name, outputs[name])
    for name in {"pairs", "blocks"} & set(case.raw):  # text cases keep what is expected in their description
        assert outputs[name] == case.raw[name]


def test_a_case_of_unknown_kind_is_named():
    with pytest.raises(KeyError, match="unheard_of"):
        golden_adapter.run("unheard_of", {}, {})
