"""Remembered answers: keyed by content and tester, unharmed by damage; ensembles; peak memory."""

import mmap
import time

import pytest
import torch

from common.errors import ConfigError, DataError
from rpg.candidates import Network
from rpg.efficiency import peak_memory
from rpg.ensembles import compute_ensemble, ensemble_prediction
from rpg.predictions import PredictionCache, hash_tester, predict, state_hash
from rpg.testing import PythonTester, TesterSection, build_tester

SECTION = TesterSection(kind="python", target="tests.rpg.test_predictions:LinearTester", options={"samples": 30})


class LinearTester(PythonTester):
    """Tests 3 x 4 matrices on random inputs; counts what it is asked."""

    calls = 0

    def __init__(self, samples: int = 30, only_predicts: bool = False) -> None:
        draw = torch.Generator().manual_seed(0)
        self.x_ND = torch.randn(samples, 4, generator=draw)
        self.y_N = torch.randint(3, (samples,), generator=draw)
        if only_predicts:
            self.logits = None

    def logits(self, state, *, task=None):
        LinearTester.calls += 1
        return self.x_ND @ state["w"].T, self.y_N

    def predict(self, state, *, task=None):
        return (self.x_ND @ state["w"].T).argmax(-1), self.y_N


def network(seed: int) -> dict[str, torch.Tensor]:
    return {"w": torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))}


def test_a_hash_tells_values_types_and_names_apart():
    state = {"a": torch.arange(4.0), "b": torch.tensor(1), "empty": torch.zeros(0), "flag": torch.tensor([True, False])}
    reordered = dict(reversed(state.items()))
    assert state_hash(state) == state_hash(reordered)
    others = [
        {**state, "a": state["a"] + 1e-6},
        {**state, "a": state["a"].double()},
        {**state, "a": state["a"].reshape(2, 2)},
        {**state, "b": torch.tensor(2)},
        {"c" if name == "a" else name: tensor for name, tensor in state.items()},
        {**state, "a": state["a"].to(torch.bfloat16)},
    ]
    assert len({state_hash(each) for each in [state, *others]}) == 7
    assert state_hash({"a": torch.arange(6.0).reshape(2, 3).T}) == state_hash(
        {"a": torch.arange(6.0).reshape(2, 3).T.contiguous()}
    )


def test_answers_are_remembered_by_network_task_and_tester(tmp_path):
    tester, cache = build_tester(SECTION), PredictionCache(tmp_path, hash_tester(SECTION))
    first = predict(tester, cache, network(0), task=None)
    again = predict(tester, cache, network(0), task=None)
    assert torch.equal(first.predicted_N, again.predicted_N) and torch.equal(first.target_N, again.target_N)
    assert (cache.hits, cache.misses) == (1, 1)
    predict(tester, cache, network(1), task=None)
    predict(tester, cache, network(0), task=7)
    assert (cache.hits, cache.misses) == (1, 3)
    other = PredictionCache(tmp_path, hash_tester(TesterSection(**{**vars(SECTION), "options": {"samples": 31}})))
    assert other.find(state_hash(network(0))) is None
    assert first.accuracy == float((first.predicted_N == first.target_N).double().mean())
    assert torch.equal(first.wrong_N, first.predicted_N != first.target_N)


def test_a_damaged_file_is_tested_again(tmp_path, caplog):
    tester, cache = build_tester(SECTION), PredictionCache(tmp_path, hash_tester(SECTION))
    expected = predict(tester, cache, network(0), task=None)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"half a file")
    found = predict(tester, cache, network(0), task=None)
    assert torch.equal(found.predicted_N, expected.predicted_N) and "is damaged" in caplog.text
    assert cache.find(f"{state_hash(network(0))} task=None") is not None
    assert [each.name for each in tmp_path.iterdir()] == [path.name]  # no temporary file stays


def test_the_time_limit_is_no_part_of_a_testers_identity_but_its_data_are(tmp_path):
    def hashed(**changes):
        return hash_tester(TesterSection(**{**vars(SECTION), **changes}))

    data = tmp_path / "images.bin"
    data.write_bytes(b"1")
    before = hashed(options={"folder": str(data)})
    assert hashed(timeout_seconds=5.0) == hashed() != before
    data.write_bytes(b"12")
    assert hashed(options={"folder": str(data)}) != before


def test_an_ensemble_answers_by_the_mean_of_logits(tmp_path):
    tester, cache = build_tester(SECTION), PredictionCache(tmp_path, hash_tester(SECTION))
    members = [Network(str(seed), lambda seed=seed: network(seed)) for seed in range(3)]
    plain = LinearTester()
    mean_NC = sum(plain.logits(network(seed))[0].double() for seed in range(3)) / 3
    assert torch.equal(ensemble_prediction(tester, members).predicted_N, mean_NC.argmax(-1))
    found = compute_ensemble(tester, cache, members, "generated")
    calls = LinearTester.calls
    assert compute_ensemble(tester, cache, members, "generated") == found and LinearTester.calls == calls
    assert found.accuracy == float((mean_NC.argmax(-1) == plain.y_N).double().mean()) and found.members == 3


def test_ensembles_need_logits_and_one_question(tmp_path):
    section = TesterSection(**{**vars(SECTION), "options": {"only_predicts": True}})
    members = [Network(str(seed), lambda seed=seed: network(seed)) for seed in range(2)]
    assert compute_ensemble(build_tester(section), PredictionCache(None, ""), members, "x") is None
    with pytest.raises(ConfigError, match="has no logits"):
        ensemble_prediction(build_tester(section), members)

    class Changing(LinearTester):
        def logits(self, state, *, task=None):
            self.y_N = (self.y_N + 1) % 3
            return super().logits(state)

    with pytest.raises(DataError, match="1 is tested on other samples or targets than 0"):
        ensemble_prediction(Changing(), members)


def test_peak_memory_sees_what_was_freed_before_the_end():
    # pages of its own: an allocation of torch may find room that the process holds already
    with peak_memory("cpu") as peak, mmap.mmap(-1, 64 << 20) as block:
        for _ in range(64):
            block.write(bytes([1]) * (1 << 20))
        time.sleep(0.1)
    assert 0.06 < peak.added_gigabytes < 2 and peak.gigabytes > peak.added_gigabytes
