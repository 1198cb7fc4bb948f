"""Every golden case of LoGAH."""

import pytest

from common.testing.golden import assert_outputs_agree, load_cases
from tests.logah import golden_adapter


def pytest_generate_tests(metafunc):
    if "case_name" in metafunc.fixturenames:
        metafunc.parametrize("case_name", load_cases("logah", metafunc.config.getoption("--golden")))


@pytest.fixture(scope="module")
def cases(golden_dir):
    return load_cases("logah", golden_dir)


def test_case_agrees_with_the_reference(case_name, cases):
    case = cases[case_name]
    assert_outputs_agree(case, golden_adapter.run(case_name, case.raw, case.inputs))


def test_a_case_of_unknown_kind_is_named():
    with pytest.raises(KeyError, match="unheard_of"):
        golden_adapter.run("unheard_of", {}, {})
