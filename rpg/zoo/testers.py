"""Testers of the networks that the recipes train; digits have theirs in ``rpg.zoo.digits`` and ``digit_tasks``.

Dimensions: N test images, C classes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.conversion import from_config
from common.errors import ConfigError, DataError
from rpg.checkpoint_files import read_checkpoint
from rpg.tasks import focal_loss, require_task, task_targets
from rpg.testing import PythonTester, State, TesterSection
from rpg.zoo.classifiers import TestImages, compute_logits
from rpg.zoo.image_data import load_split
from rpg.zoo.networks import build_network
from rpg.zoo.recipes import Recipe, load_recipe

WORK_FOLDER = ".collection"  # inside a collection; hidden, so that no reader of checkpoints looks into it
RECORD_FILE = "collection.json"
BASE_FILE = "base.safetensors"


def read_record(folder: Path | str) -> dict[str, Any]:
    """What ``python -m rpg.collect`` wrote about a collection: ``recipe``, ``tester``, seed and source revision.

    Raises: DataError if the folder is no collection.
    """
    path = Path(folder) / RECORD_FILE
    try:
        return json.loads(path.read_text())
    except OSError:
        raise DataError(f"{folder} is no collection: there is no {RECORD_FILE} in it.") from None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); collect again, or name the recipe instead.") from None


def read_recipe(folder: Path | str) -> Recipe:
    """The recipe of a collection."""
    return from_config(Recipe, read_record(folder)["recipe"], "recipe")


class RecipeTester(PythonTester):
    """Tests networks of a recipe on its test images, without augmentation and in float32.

    Args:
        collection: folder of a collection, which knows its recipe and, where only some tensors were collected, holds
            the network that they belong to.
        recipe: name of a recipe instead, or its options.
        overrides: options of the recipe, ``{data.root: DIR}``.
        base: file with the rest of the network, where only some tensors were collected.
        task: of task networks; None: the one that a file's name or the caller gives.
        device: None: the GPU if there is one.
    """

    def __init__(
        self,
        collection: str | None = None,
        recipe: str | Mapping[str, Any] | None = None,
        *,
        overrides: Mapping[str, Any] | None = None,
        base: str | None = None,
        task: int | None = None,
        batch_size: int = 256,
        device: str | None = None,
    ) -> None:
        if (collection is None) == (recipe is None):
            raise ConfigError("RecipeTester needs one of the options collection=DIR and recipe=NAME.")
        if isinstance(recipe, str):
            self.recipe = load_recipe(recipe, dict(overrides or {}))
        elif recipe is not None:
            self.recipe = _with_overrides(from_config(Recipe, recipe, "recipe"), overrides)
        else:
            self.recipe = _with_overrides(read_recipe(collection), overrides)
            if base is None and self.recipe.prepare is not None:
                base = str(Path(collection) / WORK_FOLDER / BASE_FILE)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.task = task if task is None else require_task(task, "tester.options.task")
        self.needs_task = self.recipe.condition.kind == "class" and task is None
        images = load_split(self.recipe.data, "test")
        self.classes_N, self.class_names = images.label_N, images.class_names
        self._images = TestImages(images, batch_size=batch_size, num_workers=self.recipe.data.num_workers)
        self._network = build_skeleton(self.recipe)
        self._base = None if base is None else read_checkpoint(base)
        self._base_file = base

    def logits(self, state: State, *, task: int | None = None) -> tuple[Tensor, Tensor]:
        """(logits_NC, target_N) of a network with these weights.

        Raises: DataError for a state of another network, naming the first key that does not fit.
        """
        load_strictly(self._network, state, self._base, self.recipe)
        logits_NC = compute_logits(self._network, self._images, self.device)
        if self.recipe.condition.kind != "class":
            return logits_NC, self.classes_N
        return logits_NC, task_targets(self.classes_N, require_task(self.task if task is None else task))

    def loss(self, logits_NC: Tensor, target_N: Tensor) -> float:
        """The loss of the recipe."""
        if self.recipe.training.loss == "focal":
            return float(focal_loss(logits_NC, target_N, self.recipe.training.gamma))
        return super().loss(logits_NC, target_N)


def build_skeleton(recipe: Recipe) -> nn.Module:
    """The recipe's network with random weights, never downloaded ones: a state dict comes into it."""
    section = type(recipe.network)(**{**vars(recipe.network), "pretrained": False, "weights": None})
    return build_network(section, recipe.seed)


def load_strictly(network: nn.Module, state: State, base: State | None, recipe: Recipe) -> None:
    """Loads ``state``; what a recipe does not collect comes from ``base``.

    Raises: DataError if a key is missing, unexpected or of another shape.
    """
    if recipe.saving.collected and base is None:
        raise DataError(
            f"recipe {recipe.name} collects only {', '.join(recipe.saving.collected)}; give the rest of the network as "
            "tester.options.base=FILE, or tester.options.collection=DIR."
        )
    whole = {**(base or {}), **state}
    expected = network.state_dict()
    for kind, names in (("is missing", expected.keys() - whole.keys()), ("is unknown", whole.keys() - expected.keys())):
        if names:
            raise DataError(
                f"this is no network of recipe {recipe.name}: {min(names)} {kind} ({len(names)} such keys)."
            )
    for name, value in whole.items():
        if value.shape != expected[name].shape:
            raise DataError(
                f"this is no network of recipe {recipe.name}: {name} has shape {tuple(value.shape)}, expected "
                f"{tuple(expected[name].shape)}."
            )
    network.load_state_dict(whole, strict=True)


def tester_section(recipe: Recipe, folder: Path | str) -> TesterSection:
    """The tester of the networks in a collection."""
    if recipe.method in ("digits_cnn", "digits_permutation"):
        return TesterSection(kind="python", target="rpg.zoo.digits:DigitTester")
    if recipe.method == "digits_tasks":
        return TesterSection(kind="python", target="rpg.zoo.digit_tasks:DigitTaskTester")
    if recipe.method == "adapters":
        if recipe.adapters.model is None:
            return TesterSection()
        return TesterSection(
            kind="python", target="rpg.lora_testing:AdapterTester", options={"collection": str(folder)}
        )
    return TesterSection(kind="python", target="rpg.zoo.testers:RecipeTester", options={"collection": str(folder)})


def collection_tester(path: Path | str) -> TesterSection | None:
    """The tester of the collection that ``path`` is or lies in; None if there is none, or it has no tester."""
    place = Path(path).resolve()
    folder = next((one for one in (place, *place.parents[:2]) if (one / RECORD_FILE).is_file()), None)
    if folder is None:
        return None
    section = TesterSection(**read_record(folder)["tester"])
    if "collection" in section.options:  # the folder may have moved since
        section = TesterSection(kind="python", target=section.target, options={"collection": str(folder)})
    return None if section.kind == "none" else section


def _with_overrides(recipe: Recipe, overrides: Mapping[str, Any] | None) -> Recipe:
    """A recipe with options by dotted name."""
    values = asdict(recipe)
    for option, value in (overrides or {}).items():
        *groups, leaf = option.split(".")
        target = values
        for group in groups:
            target = target.setdefault(group, {})
        target[leaf] = value
    return from_config(Recipe, values, "recipe")
