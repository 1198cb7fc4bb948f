"""Recipes: every file composes and checks, networks have the published sizes, values that cannot work are refused."""

from dataclasses import asdict

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common.conversion import from_config
from common.errors import ConfigError
from rpg.tasks import HELD_OUT_TASKS
from rpg.zoo.networks import skeleton
from rpg.zoo.recipes import (
    RECIPES_DIR,
    ConditionSection,
    Recipe,
    SavingSection,
    TrainingSection,
    load_recipe,
    recipe_names,
)

MODEL = {"adapters.model": "somewhere"}
CLASSIFIERS = [name for name in recipe_names() if not name.startswith(("lora", "dora"))]
VALUES = {  # floating-point values of a network's state dict, which the generator has to produce
    "imagenet_resnet18": 11_699_112, "imagenet_resnet50": 25_557_032, "imagenet_vittiny": 5_717_416,
    "imagenet_vitsmall": 22_050_664, "imagenet_vitbase": 86_567_656, "imagenet_convnextlarge": 197_767_336,
    "imagenet_convnextatto": 3_695_520, "cifar10_mobilenetv3": 4_239_242, "cifar10_resnet18": 11_191_242,
    "cifar10_vitbase": 85_806_346, "classinput_vittiny": 5_561_856, "cifar10_cnnsmall": 2_864,
    "cifar10_cnnmedium": 10_853, "digits_cnn": 3_730, "digits_tasks": 3_202,
}  # fmt: skip


def composed(name: str, *overrides: str):
    with initialize_config_dir(str(RECIPES_DIR.parent), version_base=None):
        return compose("collect", [f"recipe={name}", "output=x", *overrides])


@pytest.mark.parametrize("name", ["cifar100_resnet18bn", "digits_tasks", "dora_r4"])
def test_a_recipe_is_the_same_by_name_and_from_the_command_line(name):
    overrides = ["recipe.adapters.model=somewhere"] if name not in CLASSIFIERS else []
    by_hydra = from_config(Recipe, composed(name, *overrides).recipe, "recipe")
    assert by_hydra == load_recipe(name, MODEL if overrides else None)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_complete_and_sets_only_options_that_exist(name):
    options = OmegaConf.load(RECIPES_DIR.parent / "recipe_options.yaml")
    recipe = load_recipe(name, MODEL if name not in CLASSIFIERS else None)
    merged = OmegaConf.merge(options, OmegaConf.load(RECIPES_DIR / f"{name}.yaml"))
    if name not in CLASSIFIERS:
        merged.adapters.model = MODEL["adapters.model"]
    assert from_config(Recipe, merged, "recipe") == recipe and recipe.name == name


def test_the_options_of_the_command_line_are_those_of_the_dataclasses():
    options = OmegaConf.to_container(OmegaConf.load(RECIPES_DIR.parent / "recipe_options.yaml"))
    assert options == {**asdict(Recipe(name="any")), "name": None}


@pytest.mark.parametrize("name", VALUES)
def test_networks_have_as_many_values_as_published(name):
    state = skeleton(load_recipe(name).network).state_dict()
    assert sum(value.numel() for value in state.values() if value.is_floating_point()) == VALUES[name]


@pytest.mark.parametrize(
    "name, seed, batch_size, lr, weight_decay, epochs, save_lr, count",
    [
        ("cifar10_resnet18", 20, 500, 3e-3, 0.1, 50, 1e-5, 50),
        ("cifar10_mobilenetv3", 20, 500, 3e-3, 0.1, 5, 1e-6, 50),
        ("cifar10_vitbase", 20, 500, 3e-5, 0.1, 7, 1e-5, 50),
        ("cifar10_cnnsmall", 20, 500, 1e-2, 0.001, 50, 1e-5, 50),
        ("cifar10_cnnmedium", 20, 500, 1e-2, 0.00666, 50, 1e-5, 50),
        ("cifar100_resnet18bn", 20, 100, 0.01, 5e-6, 1, 0.01, 200),
        ("imagenet_resnet18", 20, 500, 1e-5, 0.1, 0, 1e-5, 50),
        ("imagenet_resnet50", 21, 200, 1e-6, 0.1, 0, 1e-6, 50),
        ("imagenet_vittiny", 20, 50, 1e-5, 0.1, 0, 1e-5, 50),
        ("imagenet_vitsmall", 20, 200, 1e-6, 0.1, 0, 1e-6, 50),
        ("imagenet_vitbase", 20, 100, 3e-6, 0.1, 0, 3e-6, 50),
        ("imagenet_convnextatto", 20, 256, 1e-6, 0.1, 0, 1e-6, 50),
        ("imagenet_convnextlarge", 20, 256, 3e-5, 0.1, 1, 3e-5, 50),
        ("classinput_vittiny", 20, 500, 1e-4, 0.1, 13, 2e-5, 5),
        ("imageinput_vittiny", 20, 250, 3e-5, 0.1, 13, 1e-5, 10),
        ("permutation_vittiny", 20, 250, 5e-3, 0.1, 200, 2e-5, 5),
        ("finetune_vittiny", 20, 500, 2e-5, 0.1, 50, 1e-6, 50),
    ],
)
def test_recipes_have_the_published_values(name, seed, batch_size, lr, weight_decay, epochs, save_lr, count):
    recipe = load_recipe(name)
    training = recipe.training
    assert (recipe.seed, training.batch_size, training.lr, training.weight_decay) == (
        seed,
        batch_size,
        lr,
        weight_decay,
    )
    assert (training.epochs, training.save_lr, recipe.saving.count) == (epochs, save_lr, count)


def test_task_sets_cover_what_they_say():
    assert len(load_recipe("classinput_vittiny").condition.resolve()) == 1022
    assert load_recipe("imageinput_vittiny").condition.resolve() == tuple(2**bit for bit in range(10))
    assert load_recipe("permutation_vittiny").condition.resolve() == tuple(range(20))
    assert ConditionSection(kind="class", values="unseen").resolve() == tuple(sorted(HELD_OUT_TASKS))
    assert ConditionSection(kind="seed", values=[3, 1]).resolve() == (3, 1)


def test_the_rate_falls_along_a_cosine_and_stays():
    training = TrainingSection(lr=1.0, save_lr=0.1, epochs=4)
    assert [round(training.lr_at(epoch), 4) for epoch in range(6)] == [1.0, 0.8682, 0.55, 0.2318, 0.1, 0.1]
    assert TrainingSection(lr=0.3, save_lr=0.1, epochs=0).lr_at(0) == 0.1


def test_checkpoints_are_spread_over_an_epoch_or_consecutive():
    assert SavingSection(count=50).interval(100) == 2
    assert SavingSection(count=50).interval(30) == 1
    assert SavingSection(count=5, spacing="step").interval(100) == 1


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"condition": {"kind": "class", "values": [0]}, "network": {"num_classes": 2}}, "1 to 1022"),
        ({"condition": {"kind": "class", "values": "some"}, "network": {"num_classes": 2}}, "all, seen"),
        ({"condition": {"kind": "seed", "values": [-1]}}, "from 0"),
        ({"condition": {"kind": "seed", "values": "all"}}, "list of seeds"),
        ({"condition": {"kind": "class"}}, "num_classes"),
        ({"method": "adapters"}, "recipe.adapters"),
        ({"tag": "a/b"}, "recipe.tag"),
        ({"training": {"lr": -1}}, "training.lr"),
        ({"training": {"batch": 3}}, "training.batch_size"),
    ],
)
def test_options_that_cannot_work_are_refused(options, reason):
    with pytest.raises(ConfigError, match=reason):
        from_config(Recipe, {"name": "x", **options}, "recipe")


def test_an_unknown_recipe_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean cifar10_resnet18"):
        load_recipe("cifar10_resnet")
