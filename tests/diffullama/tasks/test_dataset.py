"""Rows from files and folders in the published formats, and what is said when they are not there."""

import datasets
import pytest

from common.errors import DataError
from diffullama.tasks.choice import CHOICE_TASKS
from diffullama.tasks.dataset import load_rows
from diffullama.tasks.text import TEXT_TASKS
from tests.diffullama.tasks.examples import ROWS, write_rows

PIQA = CHOICE_TASKS["piqa"].source


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "folder", "saved", "saved splits"])
def test_a_local_copy_in_any_form_gives_the_same_rows(form, tmp_path):
    data = datasets.Dataset.from_list(ROWS["piqa"])
    if form == "jsonl":
        place = write_rows(tmp_path)["piqa"]
    elif form == "csv":
        data.to_csv(place := str(tmp_path / "piqa.csv"))
    elif form == "parquet":
        data.to_parquet(place := str(tmp_path / "piqa.parquet"))
    elif form == "folder":
        (tmp_path / "piqa").mkdir()
        data.to_json(str(tmp_path / "piqa" / "validation.jsonl"))
        data.select([0]).to_json(str(tmp_path / "piqa" / "train.jsonl"))
        place = str(tmp_path / "piqa")
    else:
        saved = data if form == "saved" else datasets.DatasetDict({"train": data.select([0]), "validation": data})
        saved.save_to_disk(place := str(tmp_path / "piqa"))
    assert load_rows("piqa", PIQA, place=place, cache_dir=str(tmp_path / "cache")) == ROWS["piqa"]


def test_plain_text_is_lambada_and_columns_may_have_their_other_names(tmp_path):
    (tmp_path / "lambada.txt").write_text("one two\nthree four\n")
    source = TEXT_TASKS["lambada"].source
    rows = load_rows("lambada", source, place=str(tmp_path / "lambada.txt"), cache_dir=str(tmp_path / "cache"))
    assert [row["text"] for row in rows] == ["one two", "three four"]
    place = write_rows(tmp_path)["gsm8k"]
    (row,) = load_rows("gsm8k", TEXT_TASKS["gsm8k"].source, place=place, cache_dir=str(tmp_path / "cache"))
    assert row["question"] == row["instruction"] and row["answer"] == row["output"]


def test_splits_can_be_joined(tmp_path):
    data = datasets.Dataset.from_list(ROWS["rocstories"])
    datasets.DatasetDict({"train": data.select([0]), "eval": data.select([1])}).save_to_disk(str(tmp_path / "roc"))
    rows = load_rows("rocstories", TEXT_TASKS["rocstories"].source, place=str(tmp_path / "roc"))
    assert rows == ROWS["rocstories"]


def test_mistakes_name_the_option_and_the_remedy(tmp_path):
    (tmp_path / "cut.jsonl").write_text('{"goal": "x", "sol1"')
    (tmp_path / "other.jsonl").write_text('{"goal": "x", "sol1": "a", "sol2": "b"}\n')
    (tmp_path / "piqa.xml").write_text("<x/>")
    for place, message in [
        (None, r"(?s)data.piqa: baber/piqa, split 'validation', cannot be loaded.*save_to_disk.*data.piqa=folder"),
        ("owner/name:config", r"owner/name \(config\), split"),
        (str(tmp_path / "missing.jsonl"), "does not exist"),
        (str(tmp_path / "cut.jsonl"), "cut.jsonl cannot be read"),
        (str(tmp_path / "other.jsonl"), "has no column label, only goal, sol1, sol2"),
        (str(tmp_path / "piqa.xml"), "ending that is not read"),
    ]:
        with pytest.raises(DataError, match=message):
            load_rows("piqa", PIQA, place=place, cache_dir=str(tmp_path / "cache"))
