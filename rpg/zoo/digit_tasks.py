"""Tiny networks for the 1022 tasks "is this digit in the set?", all trained as one ensemble.

All task networks start from the same weights: a trunk that was trained on the ten digits, and one random two-way
head. They are fine-tuned together with batched matrix products, on the same images, so that 460 tasks take eight
seconds. Networks of different tasks then lie near each other and differ by what the task asks for, which a generator
conditioned on the ten bits can learn.

Letters: T tasks, N images, B batch, I inputs (64 pixels), H hidden units, C classes.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from common.errors import ConfigError, DataError
from common.seeding import generator
from rpg.tasks import (
    HELD_OUT_TASKS,
    NUM_TASKS,
    CheckpointName,
    class_vectors,
    focal_loss,
    require_task,
    seen_tasks,
    task_targets,
)
from rpg.testing import PythonTester, State
from rpg.zoo.digits import TRAIN_IMAGES, load_images, require_split

INPUTS, HIDDEN = 64, 32
TRUNK_CLASSES, TASK_CLASSES = 10, 2
KEYS = ("w1", "b1", "w2", "b2", "w3", "b3")
Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class DigitTaskRecipe:
    """How the trunk and the task networks are trained."""

    trunk_steps: int = 600
    trunk_lr: float = 3e-3
    steps: int = 300  # of fine-tuning to the tasks
    lr: float = 1e-2
    save_lr: float = 3e-4  # the rate that the cosine ends at and that checkpoints are saved along
    batch_size: int = 64
    weight_decay: float = 0.05
    input_noise: float = 0.1  # standard deviation of what is added to training images
    num_checkpoints: int = 3  # states kept per task, at consecutive steps

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= TRAIN_IMAGES:
            raise ConfigError(
                f"batch_size={self.batch_size} does not fit the {TRAIN_IMAGES} training digits; "
                f"choose 1 to {TRAIN_IMAGES}."
            )
        if min(self.trunk_steps, self.steps) < 0 or self.num_checkpoints < 1:
            raise ConfigError(
                f"trunk_steps={self.trunk_steps}, steps={self.steps}, num_checkpoints={self.num_checkpoints}: steps "
                "must be 0 or more and at least one checkpoint must be kept."
            )

    def lr_at(self, step: int) -> float:
        """Learning rate of fine-tuning: a cosine from ``lr`` to ``save_lr``, constant afterwards."""
        progress = min(1.0, step / self.steps) if self.steps else 1.0
        return self.save_lr + (self.lr - self.save_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def choose_tasks(num_seen: int, num_unseen: int, seed: int) -> tuple[list[int], list[int]]:
    """Seen and unseen tasks, sorted and disjoint; the fixed held-out tasks come first among the unseen ones.

    Raises: ConfigError if there are not as many tasks.
    """
    others = seen_tasks()
    extra = max(0, num_unseen - len(HELD_OUT_TASKS))
    if num_seen + extra > len(others) or min(num_seen, num_unseen) < 0:
        raise ConfigError(
            f"num_seen={num_seen} and num_unseen={num_unseen} do not fit {NUM_TASKS} tasks of which "
            f"{len(HELD_OUT_TASKS)} are always held out; choose fewer."
        )
    order = torch.randperm(len(others), generator=generator(seed, "tasks")).tolist()
    shuffled = [others[index] for index in order]
    unseen = [*HELD_OUT_TASKS[:num_unseen], *shuffled[:extra]]
    return sorted(shuffled[extra : extra + num_seen]), sorted(unseen)


@functools.cache
def flat_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (797, 64) and digits, test images (1000, 64) and digits."""
    images = load_images()
    return images.train_N1HW.flatten(1), images.train_label_N, images.test_N1HW.flatten(1), images.test_label_N


def targets(tasks: Sequence[int], label_N: Tensor) -> Tensor:
    """(T, N) int64: 1 where the digit belongs to the task's set."""
    return class_vectors(tasks).long()[:, label_N]


def ensemble_logits(weights: State, inputs_NI: Tensor) -> Tensor:
    """Logits (T, N, C) of stacked networks: every key of ``KEYS`` with a leading dimension T."""
    w1_THI, w2_THH, w3_TCH = weights["w1"], weights["w2"], weights["w3"]
    # images last: one large product for the first layer, batched ones without transposed copies for the others
    hidden_THN = (w1_THI.flatten(0, 1) @ inputs_NI.T).unflatten(0, w1_THI.shape[:2]) + weights["b1"][..., None]
    hidden_THN = torch.baddbmm(weights["b2"][..., None], w2_THH, hidden_THN.relu()).relu()
    return torch.baddbmm(weights["b3"][..., None], w3_TCH, hidden_THN).transpose(1, 2)


def initial_weights(num_classes: int, seed: int, purpose: str) -> Weights:
    """One network with the default initial weights of linear layers, no leading dimension."""
    draws = generator(seed, purpose)
    weights: Weights = {}
    for layer, (rows, columns) in enumerate(((HIDDEN, INPUTS), (HIDDEN, HIDDEN), (num_classes, HIDDEN)), start=1):
        bound = 1 / math.sqrt(columns)
        weights[f"w{layer}"] = torch.empty(rows, columns).uniform_(-bound, bound, generator=draws)
        weights[f"b{layer}"] = torch.empty(rows).uniform_(-bound, bound, generator=draws)
    return weights


def batches(recipe: DigitTaskRecipe, seed: int, purpose: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless training batches (noisy images (B, 64), digits (B))."""
    images_NI, label_N, _, _ = flat_images()
    draws = generator(seed, purpose)
    while True:
        for index_B in torch.randperm(len(label_N), generator=draws).split(recipe.batch_size):
            if len(index_B) == recipe.batch_size:
                noise_BI = torch.randn(len(index_B), INPUTS, generator=draws)
                yield images_NI[index_B] + recipe.input_noise * noise_BI, label_N[index_B]


def train_trunk(seed: int, recipe: DigitTaskRecipe | None = None) -> Weights:
    """A network of ten classes; its first two layers are what the task networks start from."""
    recipe = recipe or DigitTaskRecipe()
    weights = {
        key: value[None].requires_grad_() for key, value in initial_weights(TRUNK_CLASSES, seed, "trunk").items()
    }
    optimizer = torch.optim.AdamW(weights.values(), lr=recipe.trunk_lr, weight_decay=recipe.weight_decay)
    drawn = batches(recipe, seed, "trunk batches")
    for _, (inputs_BI, label_B) in zip(range(recipe.trunk_steps), drawn, strict=False):
        optimizer.zero_grad()
        functional.cross_entropy(ensemble_logits(weights, inputs_BI)[0], label_B).backward()
        optimizer.step()
    return {key: value.detach()[0] for key, value in weights.items()}


def train_tasks(tasks: Sequence[int], seed: int, recipe: DigitTaskRecipe | None = None) -> Iterator[Weights]:
    """Fine-tunes the networks of all tasks together.

    Yields: the stacked states (every key with a leading dimension T, in the order of ``tasks``) after each of the last
        ``num_checkpoints`` steps. A task's network does not depend on which others are trained with it, up to rounding.
    """
    recipe = recipe or DigitTaskRecipe()
    trunk, head = train_trunk(seed, recipe), initial_weights(TASK_CLASSES, seed, "head")
    start = {key: head[key] if key in ("w3", "b3") else trunk[key] for key in KEYS}
    weights = {key: value.expand(len(tasks), *value.shape).clone().requires_grad_() for key, value in start.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    _, label_N, _, _ = flat_images()
    bits_TC = targets(tasks, torch.arange(TRUNK_CLASSES))
    last = recipe.steps + recipe.num_checkpoints
    for step, (inputs_BI, label_B) in zip(range(last), batches(recipe, seed, "task batches"), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        optimizer.zero_grad()
        logits_RC = ensemble_logits(weights, inputs_BI).flatten(0, 1)
        # the sum over tasks, so that a task's gradient is the one it would have alone
        (focal_loss(logits_RC, bits_TC[:, label_B].flatten()) * len(tasks)).backward()
        optimizer.step()
        if step >= recipe.steps:
            yield {key: value.detach().clone() for key, value in weights.items()}


def unstack(weights: State, index: int) -> Weights:
    """The state of one network of an ensemble."""
    return {key: weights[key][index].clone() for key in KEYS}


def named_networks(
    tasks: Sequence[int], seed: int, recipe: DigitTaskRecipe | None = None, *, tag: str = "digits_tasks"
) -> Iterator[tuple[CheckpointName, Weights]]:
    """Trained networks with the names they are stored under, which hold the accuracy on the test digits and the task.

    All checkpoints of one task are numbered from 1 in the order of their steps.
    """
    _, _, _, test_label_N = flat_images()
    target_TN = targets(tasks, test_label_N)
    for number, weights in enumerate(train_tasks(tasks, seed, recipe), start=1):
        accuracy_T = (predictions(weights) == target_TN).double().mean(1)
        for index, task in enumerate(tasks):
            yield CheckpointName(number, float(accuracy_T[index]), tag, "class", task), unstack(weights, index)


def stack(states: Sequence[State]) -> Weights:
    """Several states as one ensemble.

    Raises: DataError for a state of another network.
    """
    shapes = {key: value.shape for key, value in initial_weights(TASK_CLASSES, 0, "head").items()}
    for state in states:
        found = {key: tuple(value.shape) for key, value in state.items()}
        if found != {key: tuple(shape) for key, shape in shapes.items()}:
            raise DataError(f"this is no network of a digit task: its tensors are {found}; expected {shapes}.")
    return {key: torch.stack([state[key].float() for state in states]) for key in KEYS}


@torch.no_grad()
def predictions(states: Sequence[State] | State, *, split: str = "test") -> Tensor:
    """Predicted answers (T, N) of many networks at once; states one by one or stacked."""
    weights = states if isinstance(states, dict) else stack(states)
    train_NI, _, test_NI, _ = flat_images()
    inputs_NI = test_NI if require_split(split) == "test" else train_NI
    parts = [
        ensemble_logits({key: value[first : first + 64] for key, value in weights.items()}, inputs_NI).argmax(-1)
        for first in range(0, len(weights["w1"]), 64)
    ]
    return torch.cat(parts)


class DigitTaskTester(PythonTester):
    """Tests networks of digit tasks on the 1000 test digits.

    Args:
        task: 1 to 1022; None: the one that a file's name or the caller gives.
        split: ``test`` or ``train``.

    Raises: ConfigError for a task outside the range or an unknown split.
    """

    needs_task = True

    def __init__(self, task: int | None = None, split: str = "test") -> None:
        self.task = task if task is None else require_task(task, "tester.options.task")
        self.needs_task = task is None
        self.split = require_split(split)
        train_NI, train_label_N, test_NI, test_label_N = flat_images()
        self.inputs_NI = test_NI if split == "test" else train_NI
        self.classes_N = test_label_N if split == "test" else train_label_N

    @torch.no_grad()
    def logits(self, state: State, *, task: int | None = None) -> tuple[Tensor, Tensor]:
        """Logits (N, 2) of a network and the right answers (N,).

        Raises: DataError for a state of another network; ConfigError if no task is known.
        """
        target_N = task_targets(self.classes_N, require_task(self.task if task is None else task))
        return ensemble_logits(stack([state]), self.inputs_NI)[0], target_N

    def loss(self, logits_NC: Tensor, target_N: Tensor) -> float:
        """The focal loss that task networks are trained with."""
        return float(focal_loss(logits_NC, target_N))
