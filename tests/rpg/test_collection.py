"""Collections: a killed one ends with the same bits, tasks and seeds lie where they belong, parts keep their base."""

import dataclasses
import json
import shutil

import pytest
import torch

from common.errors import CheckpointError, ConfigError
from rpg import collect as command
from rpg.checkpoint_files import find_checkpoints, read_checkpoint
from rpg.collection import collect, plan
from rpg.collection_config import CollectConfig
from rpg.network_tests import TestNetworkConfig, find_tester
from rpg.tasks import parse_name
from rpg.testing import build_tester
from rpg.zoo.classifiers import StateFile, Training
from rpg.zoo.networks import NetworkSection, build_network
from rpg.zoo.recipes import Recipe, load_recipe
from rpg.zoo.testers import BASE_FILE, WORK_FOLDER, RecipeTester
from tests.rpg.tiny_images import tiny_recipe, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def config(recipe: Recipe, output, **options) -> CollectConfig:
    return CollectConfig(recipe=recipe, output=str(output), progress=False, state_interval_seconds=0, **options)


def contents(folder) -> dict[str, dict]:
    return {path.name: read_checkpoint(path) for path in find_checkpoints(folder)}


def assert_same_networks(one, other):
    assert list(one) == list(other)
    for name in one:
        assert all(torch.equal(one[name][key], other[name][key]) for key in one[name])


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "tiny"
    collect(config(tiny_recipe(images), output))
    return output


def test_checkpoints_load_and_have_the_accuracy_in_their_names(whole):
    paths = find_checkpoints(whole)
    assert [parse_name(path).index for path in paths] == [1, 2]
    tester = build_tester(find_tester(TestNetworkConfig(path=str(whole))))
    for path in paths:
        assert tester.test(path).accuracy == pytest.approx(parse_name(path).accuracy, abs=5e-5)
    assert all(value.dtype == torch.float32 for value in read_checkpoint(paths[0]).values())


@pytest.mark.parametrize("killed_after", [2, 4, 10])
def test_a_killed_collection_ends_with_the_same_bits(images, whole, tmp_path, monkeypatch, killed_after):
    """2: in the epoch of the head; 4: after it; 10: between the two checkpoints."""
    steps, train_on = [], Training._train_on

    def killed(self, images_B, label_B):
        steps.append(1)
        if len(steps) > killed_after:
            raise KeyboardInterrupt
        return train_on(self, images_B, label_B)

    monkeypatch.setattr(Training, "_train_on", killed)
    with pytest.raises(KeyboardInterrupt):
        collect(config(tiny_recipe(images), tmp_path))
    monkeypatch.setattr(Training, "_train_on", train_on)
    collect(config(tiny_recipe(images), tmp_path))
    assert_same_networks(contents(tmp_path), contents(whole))
    assert not list((tmp_path / WORK_FOLDER).glob("*.pt"))


def test_loader_workers_change_nothing(images, whole, tmp_path):
    collect(config(tiny_recipe(images, data={"num_workers": 1}), tmp_path))
    assert_same_networks(contents(tmp_path), contents(whole))


def test_what_is_finished_is_not_trained_again(images, whole, monkeypatch):
    monkeypatch.setattr(Training, "run", None)
    assert len(collect(config(tiny_recipe(images), whole)).accuracies) == 2


def test_a_checkpoint_that_was_deleted_comes_back(images, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    find_checkpoints(tmp_path / "copy")[0].unlink()
    collect(config(tiny_recipe(images), tmp_path / "copy"))
    assert_same_networks(contents(tmp_path / "copy"), contents(whole))


def test_another_recipe_and_foreign_folders_are_refused(images, whole, tmp_path):
    with pytest.raises(ConfigError, match=r"recipe.training.lr=0.01, now it is 0.02"):
        collect(config(tiny_recipe(images, training={"lr": 0.02}), whole))
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is no collection"):
        collect(config(tiny_recipe(images), tmp_path))


def test_a_training_that_another_process_has_is_left_to_it(images, tmp_path):
    from filelock import FileLock

    (tmp_path / WORK_FOLDER).mkdir()
    with FileLock(tmp_path / WORK_FOLDER / "training.lock"):
        done = collect(config(tiny_recipe(images), tmp_path))
    assert done.elsewhere == ("training",) and done.accuracies == ()


def test_task_networks_go_to_their_folders_and_are_tested_on_their_task(images, tmp_path):
    changed = {
        "network": {"num_classes": 2},
        "training": {"loss": "focal", "epochs": 0, "head_epochs": 0},
        "condition": {"kind": "class", "values": [512, 278], "held_out": [278]},
        "saving": {"count": 1, "spacing": "step"},
    }
    recipe = tiny_recipe(images, **changed)
    collect(config(recipe, tmp_path))
    (seen,), (unseen,) = (find_checkpoints(tmp_path / name) for name in ("checkpoint_train", "checkpoint_test"))
    assert (parse_name(seen).task, parse_name(unseen).task) == (512, 278)
    tester = build_tester(find_tester(TestNetworkConfig(path=str(seen))))
    result = tester.test(seen)
    assert result.accuracy == pytest.approx(parse_name(seen).accuracy, abs=5e-5)
    targets = tester.predict(read_checkpoint(seen), task=512)[1]
    assert torch.equal(targets, (tester.classes_N == 0).long())
    more = dataclasses.replace(recipe, condition=dataclasses.replace(recipe.condition, values=[512, 278, 3]))
    assert len(collect(config(more, tmp_path)).accuracies) == 3  # tasks can be added later


def test_seeds_in_two_processes_give_what_one_gives(images, tmp_path):
    changed = {
        "training": {"epochs": 0, "head_epochs": 0},
        "condition": {"kind": "seed", "values": 2},
        "saving": {"count": 1, "spacing": "step"},
    }
    recipe = tiny_recipe(images, **changed)
    assert [job.name for job in plan(recipe)] == ["seed0000", "seed0001"]
    collect(config(recipe, tmp_path / "one"))
    collect(config(recipe, tmp_path / "two", processes=2))
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert list(one) == list(two) and len({parse_name(name).seed for name in one}) == 2
    for name in one:  # thread counts differ
        assert all(torch.allclose(one[name][key], two[name][key], atol=1e-5) for key in one[name])


def test_a_part_of_a_network_is_collected_with_its_base_beside_it(tmp_path):
    vectors = ["features.5.weight", "features.5.bias"]
    recipe = load_recipe(
        "digits_cnn",
        {
            "name": "part", "method": "classifier", "network.trainable": vectors, "saving.collected": vectors,
            "saving.count": 2, "data.limit_test": 200, "training.epochs": 0,
            "prepare": {"batch_size": 64, "precision": "fp32", "epochs": 1, "lr": 3e-3, "save_lr": 1e-3},
        },
    )  # fmt: skip
    collect(config(recipe, tmp_path))
    first, second = (read_checkpoint(path) for path in find_checkpoints(tmp_path))
    assert list(first) == vectors and not torch.equal(first[vectors[0]], second[vectors[0]])
    tester = RecipeTester(collection=str(tmp_path))
    result = build_tester(find_tester(TestNetworkConfig(path=str(tmp_path)))).test(find_checkpoints(tmp_path)[1])
    assert result.accuracy == pytest.approx(parse_name(find_checkpoints(tmp_path)[1]).accuracy, abs=5e-5)
    assert tester.logits(second)[0].shape == (200, 10)
    (tmp_path / WORK_FOLDER / BASE_FILE).unlink()
    (tmp_path / WORK_FOLDER / "training.json").unlink()
    with pytest.raises(CheckpointError, match="is gone"):
        collect(config(recipe, tmp_path))


def test_frozen_norms_keep_their_statistics(images):
    section = NetworkSection(name="digit_cnn", trainable=["features.5.weight"])
    recipe = load_recipe("digits_cnn")
    from rpg.zoo.image_data import load_split

    network = build_network(section)
    before = network.features[5].running_mean.clone()
    training = Training(network, recipe.training, load_split(recipe.data, "train"), seed=0, frozen_norms=True)
    list(training.run())
    assert torch.equal(network.features[5].running_mean, before)
    assert not torch.equal(network.features[5].weight, torch.ones(16))


def test_a_damaged_state_is_named(tmp_path):
    path = tmp_path / "training.pt"
    path.write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"training.pt is damaged"):
        StateFile(path).read()


def test_the_command_collects_digits(tmp_path, monkeypatch, capsys):
    arguments = ["recipe=digits_tasks", "recipe.condition.values=[1,279]", "recipe.digits.trunk_steps=20"]
    arguments += ["recipe.digits.steps=20", f"output={tmp_path / 'tasks'}", "format=safetensors"]
    monkeypatch.setattr("sys.argv", ["collect", *arguments])
    assert command.main() == 0
    assert "6 checkpoints" in capsys.readouterr().out
    assert len(find_checkpoints(tmp_path / "tasks" / "checkpoint_test")) == 3
    record = json.loads((tmp_path / "tasks" / "collection.json").read_text())
    assert record["tester"]["target"] == "rpg.zoo.digit_tasks:DigitTaskTester" and record["git_revision"]


def test_the_command_refuses_what_it_cannot_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["collect", "recipe=lora", f"output={tmp_path / 'x'}"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2 and "recipe.adapters.model" in capsys.readouterr().err
