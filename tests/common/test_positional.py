"""Commands that take a path first."""

from common.positional import name_arguments


def test_a_first_argument_without_a_name_gets_one():
    assert name_arguments(["a b/c'd", "x=1", "--cfg", "rest"], "folder", "out") == [
        "folder='a b/c\\'d'", "x=1", "--cfg", "out='rest'",
    ]  # fmt: skip
