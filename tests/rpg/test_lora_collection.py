"""Adapters as checkpoints: fine-tuned here, continued after a kill, taken over from another program, tested."""

import shutil

import pytest
import torch

from common.conversion import from_config
from common.errors import ConfigError, DataError
from rpg import lora_collection
from rpg.adapters import read_adapter, to_fork_names
from rpg.checkpoint_files import read_checkpoint
from rpg.collection import collect
from rpg.collection_config import CollectConfig
from rpg.lora_config import AdapterSection
from rpg.network_tests import TestNetworkConfig, find_networks, find_tester
from rpg.tasks import parse_name
from rpg.testing import build_tester
from rpg.zoo.classifiers import StateFile
from rpg.zoo.recipes import Recipe
from tests.rpg.tiny_llama import write_tiny_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("llama") / "tiny")


def options(model, **changed) -> dict:
    adapters = {
        "model": str(model), "tokenizer": "byte", "length": 16, "rank": 2, "dora": True, "precision": "fp32",
        "batch_size": 4, "micro_size": 2, "steps": 2, "test_rows": 4, "lr": 0.01, "warmup": 1, **changed,
    }  # fmt: skip
    return {"name": "tiny", "method": "adapters", "saving": {"count": 3, "spacing": "step"}, "adapters": adapters}


def config(model, output, **changed) -> CollectConfig:
    recipe = from_config(Recipe, options(model, **changed))
    return CollectConfig(recipe=recipe, output=str(output), progress=False, state_interval_seconds=0)


@pytest.fixture(scope="module")
def collection(llama, tmp_path_factory):
    output = tmp_path_factory.mktemp("adapters") / "dora"
    done = collect(config(llama, output))
    assert len(done.accuracies) == 3
    return output


def folders(output):
    return sorted(path for path in output.iterdir() if path.is_dir() and not path.name.startswith("."))


def test_adapters_are_folders_that_peft_loads_and_runs(collection, llama):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    first, *_, last = folders(collection)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), first).eval()
    assert model(input_ids=torch.arange(8)[None]).logits.shape == (1, 8, 257)
    states = [read_checkpoint(folder) for folder in (first, last)]
    assert any("magnitude" in name for name in states[0])
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_tester_of_a_collection_finds_the_accuracy_in_the_names(collection):
    paths = find_networks(str(collection))
    tester = build_tester(find_tester(TestNetworkConfig(path=str(collection))))
    for path in paths:
        result = tester.test(path)
        assert result.error is None, result.output
        assert result.accuracy == pytest.approx(parse_name(path).accuracy, abs=5e-5)
    predicted, target = tester.predict(read_checkpoint(paths[0]))
    assert predicted.shape == target.shape == (4 * 15,)
    assert tester.measure(to_fork_names(read_adapter(paths[0]))).accuracy == tester.test(paths[0]).accuracy


def test_a_state_of_another_adapter_is_a_result(collection, llama):
    tester = build_tester(find_tester(TestNetworkConfig(path=str(collection))))
    state = read_checkpoint(find_networks(str(collection))[0])
    name = next(iter(state))
    assert "is missing" in tester.measure({key: value for key, value in state.items() if key != name}).error
    assert "has shape" in tester.measure({**state, name: torch.zeros(3, 3)}).error


def test_a_killed_fine_tuning_ends_in_the_same_adapters(collection, llama, tmp_path, monkeypatch):
    calls, score = [], lora_collection.compute_score

    def killed_at_the_second(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(lora_collection, "compute_score", killed_at_the_second)
    monkeypatch.setattr(lora_collection, "StateFile", lambda path: StateFile(path, 0.0))
    with pytest.raises(KeyboardInterrupt):
        collect(config(llama, tmp_path / "cut"))
    assert len(folders(tmp_path / "cut")) == 1
    collect(config(llama, tmp_path / "cut"))
    whole, cut = folders(collection), folders(tmp_path / "cut")
    assert [path.name for path in whole] == [path.name for path in cut]
    for one, other in zip(whole, cut):
        a, b = read_checkpoint(one), read_checkpoint(other)
        assert list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_adapters_of_a_run_elsewhere_are_taken_over_once_and_the_newest_stay(collection, tmp_path):
    source, output = tmp_path / "run", tmp_path / "taken"
    source.mkdir()
    recipe = from_config(
        Recipe, options(None, watch=str(source), keep=2, idle_seconds=5.0, poll_seconds=1.0) | {"name": "theirs"}
    )
    output.mkdir()
    (output / lora_collection.WORK_FOLDER).mkdir()
    now, lines = [0.0], []

    def sleep(seconds):
        now[0] += seconds
        looks = int(now[0])
        if looks in (1, 2, 3):  # the other program saves one adapter after the other
            shutil.copytree(folders(collection)[looks - 1], source / f"checkpoint-{looks}", copy_function=shutil.copy)
        if looks == 4:  # and is interrupted while it writes a last one
            shutil.copytree(folders(collection)[0], source / "checkpoint-4")
            (source / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"half")

    lora_collection.watch(recipe, output, progress=lines.append, clock=lambda: now[0], sleep=sleep)
    taken = folders(output)
    assert [path.name for path in taken] == ["0002_theirs", "0003_theirs"]
    assert all(
        torch.equal(value, read_checkpoint(folders(collection)[2])[name])
        for name, value in read_checkpoint(taken[1]).items()
    )
    assert any("checkpoint-4 is left for later" in line for line in lines)
    before = now[0]
    lora_collection.watch(recipe, output, clock=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + 1))
    assert [path.name for path in folders(output)] == [path.name for path in taken] and now[0] > before


def test_a_model_that_is_not_there_and_layers_that_it_lacks_are_named(llama, tmp_path):
    with pytest.raises(DataError, match="cannot be loaded"):
        collect(config(tmp_path / "nothing", tmp_path / "a"))
    with pytest.raises(ConfigError, match="no_such_proj"):
        collect(config(llama, tmp_path / "b", targets=["no_such_proj"]))
    with pytest.raises(DataError, match="no folder"):
        lora_collection.watch(from_config(Recipe, options(None, watch=str(tmp_path / "gone"))), tmp_path)


def test_options_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"adapters.model is not set"):
        AdapterSection()
    with pytest.raises(ConfigError, match="micro_size=3"):
        AdapterSection(model="x", batch_size=6, micro_size=4)
