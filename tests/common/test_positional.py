"""Commands that take a path first."""

from common.positional import name_arguments


def test_a_first_argument_without_a_name_gets_one():
    assert name_arguments(["a b/c'd", "x=1", "--hydra-help", "rest"], "folder", "out") == [
        "folder='a b/c\\'d'", "x=1", "--hydra-help", "out='rest'",
    ]  # fmt: skip


def test_values_of_flags_and_options_with_a_name_are_left_alone():
    arguments = ["file.pt", "out=folder", "--cfg", "job"]
    assert name_arguments(arguments, "source", "out") == ["source='file.pt'", "out=folder", "--cfg", "job"]
    assert name_arguments(["b", "source=a"], "source", "out") == ["out='b'", "source=a"]
