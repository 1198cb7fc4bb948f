"""Recipes: which network is trained how, and which of its states become the checkpoints a generator learns from.

A recipe is a file of ``configs/rpg/recipe``; ``load_recipe`` reads one by name, and ``python -m rpg.collect`` composes
it with the options of the command line. All but the digits and the adapters are one training scheme: optional epochs
of the head alone, ``epochs`` along a cosine, then checkpoints along one more epoch at the final rate.

Source: collection of checkpoints in "Recurrent Diffusion for Large-Scale Parameter Generation" (arXiv 2501.11587).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from common.config import require_at_least, require_choice
from common.conversion import from_config, nearest
from common.errors import ConfigError
from rpg.lora_config import AdapterSection
from rpg.tasks import HELD_OUT_TASKS, require_task, seen_tasks
from rpg.zoo.image_data import ImageDataSection
from rpg.zoo.networks import NetworkSection

RECIPES_DIR = Path(__file__).resolve().parents[2] / "configs" / "rpg" / "recipe"
METHODS = ("classifier", "digits_cnn", "digits_permutation", "digits_tasks", "adapters")


@dataclass(frozen=True, kw_only=True)
class TrainingSection:
    """Options ``recipe.training.*``: epochs of the head alone, then of everything that is trained."""

    batch_size: int = 500
    precision: Literal["bf16", "fp32"] = "bf16"  # of the forward pass; bf16 is float32 where the hardware lacks it
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    gamma: float = 2.0  # focal: larger values look at hard examples more
    head_epochs: int = 0  # epochs in which only the head is trained, first
    head_lr: float = 0.05
    head_weight_decay: float = 0.01
    optimizer: Literal["AdamW", "SGD"] = "AdamW"
    momentum: float = 0.9  # SGD
    lr: float = 3e-3  # at the first epoch
    weight_decay: float = 0.1
    epochs: int = 50  # along a cosine from lr to save_lr
    save_lr: float = 1e-5  # rate at the end of the cosine

    def __post_init__(self) -> None:
        require_choice("training.precision", self.precision, ("bf16", "fp32"))
        require_choice("training.loss", self.loss, ("cross_entropy", "focal"))
        require_choice("training.optimizer", self.optimizer, ("AdamW", "SGD"))
        require_at_least("training.batch_size", self.batch_size, 1)
        for name in ("epochs", "head_epochs", "lr", "head_lr", "save_lr", "weight_decay", "head_weight_decay"):
            require_at_least(f"training.{name}", getattr(self, name), 0)

    def lr_at(self, epoch: int) -> float:
        """Rate of an epoch: a cosine from ``lr`` to ``save_lr``, which later epochs keep."""
        progress = min(1.0, epoch / self.epochs) if self.epochs else 1.0
        return self.save_lr + (self.lr - self.save_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class SavingSection:
    """Options ``recipe.saving.*``: which states become checkpoints."""

    count: int = 50  # checkpoints per training
    spacing: Literal["epoch", "step"] = "epoch"  # spread over one epoch, or at consecutive steps
    collected: list[str] = field(default_factory=list)  # patterns of the tensors that are kept; empty: all

    def __post_init__(self) -> None:
        require_at_least("saving.count", self.count, 1)
        require_choice("saving.spacing", self.spacing, ("epoch", "step"))

    def interval(self, steps_per_epoch: int) -> int:
        """Steps from one checkpoint to the next."""
        return 1 if self.spacing == "step" else max(1, steps_per_epoch // self.count)


@dataclass(frozen=True, kw_only=True)
class ConditionSection:
    """Options ``recipe.condition.*``: a training for each task or each seed."""

    kind: Literal["none", "class", "seed"] = "none"
    values: Any = (
        "all"  # class: all, seen, unseen, one_class (tasks 2^0 to 2^9) or a list of tasks; seed: a list or a count
    )
    held_out: list[int] = field(default_factory=lambda: list(HELD_OUT_TASKS))  # tasks that go to checkpoint_test

    def __post_init__(self) -> None:
        require_choice("condition.kind", self.kind, ("none", "class", "seed"))
        for task in self.held_out:
            require_task(task, "condition.held_out")
        self.resolve()

    def resolve(self) -> tuple[int | None, ...]:
        """The tasks or seeds; one None without conditions.

        Raises: ConfigError for values that are none.
        """
        if self.kind == "none":
            return (None,)
        values = self.values
        if self.kind == "class" and isinstance(values, str):
            named = {
                "all": tuple(sorted({*seen_tasks(()), *self.held_out})),
                "seen": seen_tasks(self.held_out),
                "unseen": tuple(sorted(self.held_out)),
                "one_class": tuple(2**bit for bit in range(10)),
            }
            require_choice("condition.values", values, tuple(named))
            return named[values]
        if isinstance(values, int) and not isinstance(values, bool):
            values = list(range(values)) if self.kind == "seed" else [values]
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ConfigError(
                f"condition.values={values!r} must be a list of "
                f"{'tasks, or all, seen, unseen or one_class' if self.kind == 'class' else 'seeds, or their number'}."
            )
        for value in values:
            if self.kind == "class":
                require_task(value, "condition.values")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"condition.values={list(values)}: seeds are whole numbers from 0.")
        return tuple(dict.fromkeys(values))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Options ``recipe.*``."""

    name: str
    method: Literal["classifier", "digits_cnn", "digits_permutation", "digits_tasks", "adapters"] = "classifier"
    tag: str | None = None  # last part of the files' names; null: the recipe's name
    seed: int = 20
    network: NetworkSection = field(default_factory=NetworkSection)
    data: ImageDataSection = field(default_factory=ImageDataSection)
    prepare: TrainingSection | None = (
        None  # a training of the whole network, once, before the collected part is trained
    )
    training: TrainingSection = field(default_factory=TrainingSection)
    saving: SavingSection = field(default_factory=SavingSection)
    condition: ConditionSection = field(default_factory=ConditionSection)
    digits: dict[str, Any] = field(default_factory=dict)  # digits_*: options of rpg.zoo.digits and digit_tasks
    adapters: AdapterSection | None = None  # adapters: which language model is fine-tuned on what

    def __post_init__(self) -> None:
        require_choice("recipe.method", self.method, METHODS)
        require_at_least("recipe.seed", self.seed, 0)
        if self.method == "adapters" and self.adapters is None:
            raise ConfigError("recipe.method=adapters needs recipe.adapters; see configs/rpg/recipe/lora.yaml.")
        if self.condition.kind == "class" and self.method == "classifier" and self.network.num_classes != 2:
            raise ConfigError(
                f"recipe.network.num_classes={self.network.num_classes} does not fit recipe.condition.kind=class: "
                "networks of tasks answer yes or no; set it to 2."
            )
        if any(mark in self.file_tag for mark in "/\\") or not self.file_tag:
            raise ConfigError(f"recipe.tag={self.file_tag!r} becomes part of file names; use letters, digits and _.")

    @property
    def file_tag(self) -> str:
        return self.name if self.tag is None else self.tag


def recipe_names() -> list[str]:
    """All recipes that there are."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def load_recipe(name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """The recipe called ``name``.

    Args:
        overrides: options by dotted name, ``{"data.root": "DIR"}``.

    Raises: ConfigError for an unknown recipe or option.
    """
    path = RECIPES_DIR / f"{name}.yaml"
    if not path.is_file():
        near = nearest(name, recipe_names())
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"recipe={name} is not known; choose one of {', '.join(recipe_names())}.{hint}")
    composed = OmegaConf.load(path)
    for option, value in (overrides or {}).items():
        OmegaConf.update(composed, option, value, force_add=True)
    return from_config(Recipe, composed, "recipe")
