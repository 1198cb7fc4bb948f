"""The command that tests networks: a line each, a table, exit code 1 if a test failed."""

import csv

import pytest

from rpg import test_network as command
from rpg.collection import collect
from rpg.collection_config import CollectConfig
from rpg.tasks import parse_name
from rpg.testing import parse_result
from rpg.zoo.recipes import load_recipe


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    output = tmp_path_factory.mktemp("digits") / "collection"
    recipe = load_recipe("digits_cnn", {"digits.epochs": 1, "saving.count": 2})
    collect(CollectConfig(recipe=recipe, output=str(output), progress=False))
    return output


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["test_network", *map(str, arguments)])
    try:
        return command.main()
    except SystemExit as stopped:
        return stopped.code


def test_a_file_gives_the_line_that_test_programs_print(collection, monkeypatch, capsys):
    path = sorted(collection.glob("*.pth"))[0]
    for tester in ([], ["recipe=digits_cnn"], [f"collection={collection}"]):
        assert run(monkeypatch, f"path={path}", *tester) == 0
        assert parse_result(capsys.readouterr().out)[1] == pytest.approx(parse_name(path).accuracy, abs=5e-5)


def test_a_folder_gives_a_table_and_the_mean(collection, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, f"path={collection}", f"output={tmp_path / 'a.csv'}", "detail=true") == 0
    assert "2 networks; accuracy" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [float(row["accuracy"]) for row in rows] == [parse_name(row["network"]).accuracy for row in rows]
    assert run(monkeypatch, f"path={collection}", f"output={tmp_path / 'a.csv'}") == 2  # not overwritten


def test_a_program_that_fails_shows_its_output(collection, monkeypatch, capsys):
    path = sorted(collection.glob("*.pth"))[0]
    arguments = ["tester.kind=command", 'tester.command=["{python}","-c","print(7*6); raise SystemExit(3)","{path}"]']
    assert run(monkeypatch, f"path={path}", *arguments) == 1
    printed = capsys.readouterr()
    assert "exit code 3" in printed.out and "42" in printed.err


def test_without_a_tester_the_choices_are_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.pth").write_bytes(b"")
    assert run(monkeypatch, f"path={tmp_path / 'x.pth'}") == 2
    assert "recipe=NAME" in capsys.readouterr().err
    assert run(monkeypatch, f"path={tmp_path / 'y.pth'}", "recipe=digits_cnn") == 2
    assert "does not exist" in capsys.readouterr().err
