"""Binary classification tasks over ten classes, and the names of the checkpoint files that say which task they solve.

A task says which of the ten classes are positive. Its number has ten bits, the most significant one for class 0, so
1 is "only the last class" and 1022 "all but the last class"; 0 and 1023, which are no tasks, are left out.

Dimensions: B rows, C classes of a network's output.

Source: class-conditioned generation in "Recurrent Diffusion for Large-Scale Parameter Generation" (arXiv 2501.11587).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import ConfigError, DataError

NUM_CLASSES = 10
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")  # CIFAR-10
FIRST_TASK, LAST_TASK = 1, 2**NUM_CLASSES - 2
NUM_TASKS = LAST_TASK - FIRST_TASK + 1  # 1022
HELD_OUT_TASKS = (
    101, 111, 128, 141, 197, 238, 278, 279, 314, 383, 462, 482, 502, 589, 592, 643, 653, 793, 884, 1001,
)  # fmt: skip
"""Tasks that the released generator never saw."""

CONDITIONS = ("class", "seed")  # what the third part of a file name can hold
_NAME = re.compile(
    r"(?P<index>\d{4,})_acc(?P<accuracy>\d+\.\d+)"
    r"(?:_(?P<condition>class|seed)(?P<value>\d{4,}))?"
    r"_(?P<tag>[^/]+?)(?P<suffix>\.(?:pth|pt|safetensors))?"
)
_TASK_IN_NAME = re.compile(r"(?:^|[_-])class(\d{4,})(?=[_.-]|$)")


def require_task(task: int, option: str = "task") -> int:
    """``task``, if it is one.

    Raises: ConfigError naming ``option`` unless it is a whole number from 1 to 1022.
    """
    if isinstance(task, bool) or not isinstance(task, int) or not FIRST_TASK <= task <= LAST_TASK:
        raise ConfigError(
            f"{option}={task!r} is not a task; give a whole number from {FIRST_TASK} to {LAST_TASK}, whose ten bits "
            f"say which classes are positive (the highest is class 0, {CLASS_NAMES[0]})."
        )
    return task


def task_bits(task: int) -> tuple[int, ...]:
    """Ten numbers 0 or 1, one per class: class c is positive if bit 9 - c of ``task`` is set.

    Raises: ConfigError unless ``task`` lies in 1..1022.
    """
    require_task(task)
    return tuple(task >> (NUM_CLASSES - 1 - c) & 1 for c in range(NUM_CLASSES))


def class_vector(task: int) -> Tensor:
    """``task_bits`` as the condition of a generator, float32 (10,)."""
    return torch.tensor(task_bits(task), dtype=torch.float32)


def class_vectors(tasks: Sequence[int]) -> Tensor:
    """``task_bits`` of each task, float32 (B, 10)."""
    return torch.tensor([task_bits(int(task)) for task in tasks], dtype=torch.float32).reshape(-1, NUM_CLASSES)


def task_of_vector(bits: Sequence[float], option: str = "class vector") -> int:
    """The task whose class vector is ``bits``.

    Raises: ConfigError unless there are ten entries, each 0 or 1, that are not all equal.
    """
    values = [float(bit) for bit in bits]
    if len(values) != NUM_CLASSES or any(value not in (0.0, 1.0) for value in values):
        raise ConfigError(
            f"{option}={list(bits)} has {len(values)} entries; give {NUM_CLASSES}, each 0 or 1, one per class "
            f"({', '.join(CLASS_NAMES)})."
        )
    task = sum(int(value) << (NUM_CLASSES - 1 - c) for c, value in enumerate(values))
    if not FIRST_TASK <= task <= LAST_TASK:
        raise ConfigError(f"{option}={list(bits)} has all classes on one side; a task needs both 0 and 1.")
    return task


def seen_tasks(held_out: Iterable[int] = HELD_OUT_TASKS) -> tuple[int, ...]:
    """All tasks but the held-out ones, ascending."""
    left_out = set(held_out)
    return tuple(task for task in range(FIRST_TASK, LAST_TASK + 1) if task not in left_out)


def task_targets(labels_B: Tensor, task: int) -> Tensor:
    """1 where the class of a row is positive in ``task``, else 0; int64 (B,)."""
    return torch.tensor(task_bits(task), dtype=torch.int64, device=labels_B.device)[labels_B]


def majority_rate(labels_B: Tensor, task: int) -> float:
    """Accuracy of always answering the more frequent of the two answers: what a network must beat."""
    positive = float(task_targets(labels_B, task).double().mean())
    return max(positive, 1 - positive)


def focal_loss(logits_BC: Tensor, targets_B: Tensor, gamma: float = 2.0) -> Tensor:
    """Cross-entropy weighted by (1 - p)^gamma, p the probability of the right class; mean over rows, in nats.

    Easy rows count little, which matters where one of two classes is rare.

    Source: Lin et al., "Focal Loss for Dense Object Detection" (2017), eq. 4.
    """
    nll_B = F.cross_entropy(logits_BC, targets_B, reduction="none")
    # -expm1 is exact where p is close to 1, where 1 - exp would lose all digits
    return ((-torch.expm1(-nll_B)) ** gamma * nll_B).mean()


@dataclass(frozen=True)
class CheckpointName:
    """What the name of a collected checkpoint says: ``0001_acc0.9717_class0793_condition_cifar10_vittiny.pth``.

    Attributes:
        index: number of the checkpoint within its training.
        accuracy: on the test images, 0 to 1.
        condition: ``class`` (``value`` is the task), ``seed`` (``value`` is the seed of its training) or None.
        tag: what was trained.
    """

    index: int
    accuracy: float
    tag: str
    condition: str | None = None
    value: int | None = None

    def __str__(self) -> str:
        middle = "" if self.condition is None else f"_{self.condition}{self.value:04d}"
        return f"{self.index:04d}_acc{self.accuracy:.4f}{middle}_{self.tag}"

    def file_name(self, suffix: str = ".pth") -> str:
        """The name with ``suffix``."""
        return f"{self}{suffix}"

    @property
    def task(self) -> int | None:
        return self.value if self.condition == "class" else None

    @property
    def seed(self) -> int | None:
        return self.value if self.condition == "seed" else None


def parse_name(path: Path | str) -> CheckpointName | None:
    """What a file's (or adapter folder's) name says; None if it is not in the naming scheme.

    Raises: DataError if it is in the scheme and names a task that does not exist.
    """
    match = _NAME.fullmatch(Path(path).name)
    if match is None:
        return None
    value = None if match["value"] is None else int(match["value"])
    if match["condition"] == "class" and not FIRST_TASK <= value <= LAST_TASK:
        raise DataError(f"{path}: its name says task {value}; tasks are {FIRST_TASK} to {LAST_TASK}. Rename the file.")
    return CheckpointName(int(match["index"]), float(match["accuracy"]), match["tag"], match["condition"], value)


def task_in_name(path: Path | str) -> int | None:
    """The task in a name of any scheme (``..._class0793...``), as collected and generated files carry it; else None."""
    match = _TASK_IN_NAME.search(Path(path).name)
    return int(match[1]) if match and FIRST_TASK <= int(match[1]) <= LAST_TASK else None
