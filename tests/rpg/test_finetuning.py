"""Fine-tuning from a network: the curve starts where the network is, next to random weights."""

import csv
import json

import pytest
import torch

from common.errors import ConfigError, DataError
from rpg import finetune as command
from rpg.checkpoint_files import read_checkpoint
from rpg.collection import collect
from rpg.collection_config import CollectConfig
from rpg.finetuning import FinetuneConfig, finetune
from rpg.tasks import parse_name
from rpg.zoo.recipes import load_recipe

QUICK = {"training.epochs": 1, "training.batch_size": 64}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    output = tmp_path_factory.mktemp("tasks")
    recipe = load_recipe("digits_tasks", {"condition.values": [279], "digits.steps": 60, "saving.count": 1})
    collect(CollectConfig(recipe=recipe, output=str(output), progress=False))
    (path,) = output.glob("checkpoint_test/*.pth")
    return path


def test_a_trained_network_starts_ahead_of_random_weights(network, tmp_path, monkeypatch, capsys):
    arguments = ["recipe=digits_tasks", f"network={network}", f"output={tmp_path}", "recipe.training.epochs=1"]
    monkeypatch.setattr("sys.argv", ["finetune", *arguments])
    assert command.main() == 0
    rows = list(csv.DictReader((tmp_path / "curve.csv").open()))
    assert [(row["start"], row["epoch"]) for row in rows] == [
        (network.stem, "0"), (network.stem, "1"), ("random weights", "0"), ("random weights", "1")
    ]  # fmt: skip
    assert float(rows[0]["test_accuracy"]) == pytest.approx(parse_name(network).accuracy, abs=5e-5)
    assert float(rows[0]["test_accuracy"]) > float(rows[2]["test_accuracy"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["task"] == 279 and results["seed"] == 0
    state = read_checkpoint(tmp_path / "finetuned.safetensors")
    assert not torch.equal(state["w1"], read_checkpoint(network)["w1"])
    assert "before" in capsys.readouterr().out


def test_what_cannot_work_is_refused(network, tmp_path):
    recipe = load_recipe("digits_tasks", QUICK)
    renamed = tmp_path / "network.pth"
    renamed.write_bytes(network.read_bytes())
    with pytest.raises(ConfigError, match="add task="):
        finetune(FinetuneConfig(recipe=recipe, network=str(renamed), output=str(tmp_path / "a")))
    other = load_recipe("digits_cnn", QUICK)
    with pytest.raises(DataError, match="no network of recipe digits_cnn"):
        finetune(FinetuneConfig(recipe=other, network=str(network), output=str(tmp_path / "a")))
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match="overwrite=true"):
        finetune(FinetuneConfig(recipe=recipe, network=str(network), output=str(tmp_path)))
