"""Interrupted evaluations continue, and results of other settings never mix."""

import json

import pytest
import torch

from common.errors import ConfigError
from common.evaluation.partial_results import PartialResults, fingerprint
from common.parallel import Parallel

ALONE = Parallel(0, 1, 0, torch.device("cpu"))


def test_finished_items_are_found_again_and_a_cut_line_is_not(tmp_path):
    first = PartialResults(tmp_path, "name", {"seed": 1}, ALONE)
    assert first.pending(5) == [0, 1, 2, 3, 4]
    for item in (0, 1, 2):
        first.append(item, {"nats": [item + 0.5]})
    first.close()
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-9])  # a kill in the middle of the last line
    again = PartialResults(tmp_path, "name", {"seed": 1}, ALONE)
    assert again.num_found == 2 and again.pending(5) == [2, 3, 4]
    for item in (2, 3, 4):
        again.append(item, {"nats": [item + 0.5]})
    assert again.collect() == {item: {"nats": [item + 0.5]} for item in range(5)}
    assert PartialResults(tmp_path, "name", {"seed": 1}, ALONE).pending(5) == []


def test_another_setting_starts_afresh(tmp_path):
    done = PartialResults(tmp_path, "name", {"seed": 1}, ALONE)
    done.append(0, {"x": 1})
    done.close()
    assert PartialResults(tmp_path, "name", {"seed": 2}, ALONE).pending(1) == [0]
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def test_another_number_of_processes_shares_out_what_is_left(tmp_path):
    done = PartialResults(tmp_path, "name", {}, ALONE)
    done.append(1, {"x": 1})
    done.close()

    class Rank(Parallel):
        def from_main(self, value):
            return PartialResults(tmp_path, "name", {}, ALONE)._found

    shares = [PartialResults(tmp_path, "name", {}, Rank(r, 2, r, torch.device("cpu"))).pending(6) for r in (0, 1)]
    assert shares == [[0, 3, 5], [2, 4]]


def test_files_hold_one_json_object_per_line(tmp_path):
    results = PartialResults(tmp_path, "name", {}, ALONE)
    results.append(3, {"nats": [1.25], "rows": 2})
    results.close()
    (path,) = tmp_path.glob("name_*.rank0.jsonl")
    assert json.loads(path.read_text()) == {"item": 3, "nats": [1.25], "rows": 2}


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="work_dir"):
        PartialResults(tmp_path / "file" / "below", "name", {}, ALONE)
