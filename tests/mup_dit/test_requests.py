"""Plans of what is sampled: labels by rule, prompts from files, names of files."""

import json

import pytest

from common.errors import ConfigError, DataError
from mup_dit.requests import plan_labels, plan_requests, read_prompts


def test_label_rules():
    assert plan_labels("balanced", 5, 3, 0) == [0, 1, 2, 0, 1]
    assert plan_labels(7, 3, 10, 0) == [7, 7, 7]
    assert plan_labels([1, 2], 3, 10, 0) == [1, 2, 1]
    long = plan_labels("uniform", 300, 10, 0)
    assert set(long) == set(range(10))
    assert plan_labels("uniform", 20, 10, 0) == long[:20]
    assert plan_labels("uniform", 20, 10, 1) != long[:20]
    with pytest.raises(ConfigError, match="unifrom"):
        plan_labels("unifrom", 5, 3, 0)
    with pytest.raises(ConfigError, match="no list of class numbers"):
        plan_labels(["a"], 5, 3, 0)


def test_labels_from_a_file(tmp_path):
    (tmp_path / "labels.json").write_text("[4, 5]")
    assert plan_labels(str(tmp_path / "labels.json"), 3, 10, 0) == [4, 5, 4]
    (tmp_path / "labels.json").write_text("[4, 5")
    with pytest.raises(DataError, match="no JSON"):
        plan_labels(str(tmp_path / "labels.json"), 3, 10, 0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "a cat\n\na dog \n"),
        ("a.json", json.dumps(["a cat", "a dog"])),
        ("b.json", json.dumps({"x1": {"prompt": "a cat", "category": "pets"}, "x2": {"prompt": "a dog"}})),
        ("c.json", json.dumps({"images": [], "annotations": [{"caption": "a cat"}, {"caption": "a dog"}]})),
        ("a.jsonl", '{"prompt": "a cat", "tag": "one"}\n{"prompt": "a dog"}\n'),
    ],
)
def test_prompts_of_every_kind_of_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    prompts, details = read_prompts(str(tmp_path / name))
    assert prompts == ["a cat", "a dog"]
    assert len(details) == 2


def test_prompts_given_directly_and_bad_ones(tmp_path):
    assert read_prompts("a cat")[0] == ["a cat"]
    assert read_prompts(["a cat", "a dog"])[0] == ["a cat", "a dog"]
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(str(tmp_path / "none.txt"))
    (tmp_path / "a.jsonl").write_text('{"text": "a cat"}\n')
    with pytest.raises(DataError, match="entry 0 holds no text"):
        read_prompts(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no prompts"):
        read_prompts(str(tmp_path / "a.txt"))


def test_files_are_named_by_index_or_prompt():
    prompts = ["a cat. on/mat", "a cat. on/tree", "x"]
    names = [request.file for request in plan_requests(prompts=prompts, suffix=".jpg", names="prompt", name_length=8)]
    assert names == ["a cat_ o.jpg", "a cat_ o_000001.jpg", "x.jpg"]
    plain = plan_requests(prompts=prompts, samples_per_prompt=2)
    assert [request.file for request in plain][:3] == ["000000.png", "000001.png", "000002.png"]
    assert [request.prompt for request in plain][:3] == [prompts[0], prompts[0], prompts[1]]
    assert [request.file for request in plan_requests(labels=[3])] == ["000000.png"]


def test_geneval_layout():
    files = [request.file for request in plan_requests(prompts=["a", "b"], samples_per_prompt=2, layout="geneval")]
    assert files == [f"0000{n}/samples/0000{k}.png" for n in (0, 1) for k in (0, 1)]
    assert plan_requests(prompts=["a"])[0].record() == {"index": 0, "file": "000000.png", "prompt": "a"}
