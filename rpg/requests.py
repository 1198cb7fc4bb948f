"""What is to be generated: one request per network, with its permutation state, its condition and its file's label.

A request depends on its number, its condition and the seed, and not on how many others there are.

Dimensions: B networks, C entries of a condition.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.config import require_choice
from common.errors import ConfigError, DataError
from common.seeding import generator
from rpg.tasks import (
    HELD_OUT_TASKS,
    NUM_CLASSES,
    require_task,
    seen_tasks,
    task_bits,
    task_of_vector,
)

STATE_RULES = ("auto", "random", "balanced", "none")
TASK_SETS = ("seen", "unseen")


@dataclass(frozen=True)
class Request:
    """One network to be generated.

    Attributes:
        index: number among those of its label, from 0; with the label and the seed it decides the random numbers.
        state: row of the table of permutation states; None for none.
        condition: of a conditional generator; None for an unconditional one.
        label: what its file's name says about the condition, e.g. ``class0793``; empty for nothing.
    """

    index: int
    state: int | None = None
    condition: tuple[float, ...] | None = None
    label: str = ""


@dataclass(frozen=True)
class Condition:
    """A condition and the label of its networks' files."""

    values: tuple[float, ...]
    label: str


def build_requests(
    conditions: Sequence[Condition] | None,
    num_generated: int,
    *,
    seed: int,
    states: Any = "auto",
    groups: Sequence[str] = (),
    first: Mapping[str, int] | None = None,
) -> list[Request]:
    """``num_generated`` requests per condition (condition by condition), or in all without conditions.

    Args:
        states: see ``read_states``.
        groups: names of the generator's permutation states; empty if it has none.
        first: index of a label's first request, where it is not 0.

    Raises: ConfigError for two conditions of one label, and as ``read_states``.
    """
    rule, chosen = read_states(states, groups)
    labels = [condition.label for condition in conditions or []]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ConfigError(f"the condition {twice} is asked for twice; list it once and raise num_generated.")
    requests = []
    for condition in conditions or [None]:
        label = "" if condition is None else condition.label
        start = (first or {}).get(label, 0)
        for index in range(start, start + num_generated):
            state = choose_state(rule, chosen, index, seed, label)
            requests.append(Request(index, state, None if condition is None else condition.values, label))
    return requests


def read_states(states: Any, groups: Sequence[str]) -> tuple[str, tuple[int, ...]]:
    """The rule and the rows that it chooses from.

    Args:
        states: ``auto`` (random where the generator has states), ``random``, ``balanced`` (in turn), ``none``, or rows
            or names of groups, taken in turn.

    Raises: ConfigError for a state that the generator does not have.
    """
    every = tuple(range(len(groups)))
    if isinstance(states, str) and states in STATE_RULES:
        if states in ("random", "balanced") and not groups:
            raise ConfigError(f"states={states}, but the generator has no permutation states; leave the option out.")
        rule = ("random" if groups else "none") if states == "auto" else states
        return rule, every if rule != "none" else ()
    if isinstance(states, str) and states not in groups:
        require_choice("states", states, (*STATE_RULES, *groups[:20]))
    wanted = [states] if isinstance(states, str | int) else list(states)
    rows = []
    for state in wanted:
        row = list(groups).index(state) if state in groups else state
        if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < len(groups):
            raise ConfigError(
                f"states={states}: {state!r} is none of the generator's {len(groups)} permutation states"
                f"{f' (0 to {len(groups) - 1}, or {_some(groups)})' if groups else ''}."
            )
        rows.append(row)
    if not rows:
        raise ConfigError("states=[] chooses nothing; use states=none to generate without a permutation state.")
    return "balanced", tuple(rows)


def choose_state(rule: str, rows: Sequence[int], index: int, seed: int, label: str = "") -> int | None:
    """The permutation state of request ``index`` of a label: drawn, in turn, or none."""
    if rule == "none":
        return None
    if rule == "random":
        return rows[int(torch.randint(len(rows), (), generator=generator(seed, f"permutation state {label}", index)))]
    return rows[index % len(rows)]


# ---------------------------------------------------------------- conditions


def task_conditions(
    tasks: Any, *, num_tasks: int | None = None, trained: Iterable[int] | None = None, seed: int = 0
) -> list[Condition]:
    """Class vectors of tasks.

    Args:
        tasks: ``unseen`` (held out), ``seen`` (random ones that were trained on), a number, or a list of numbers.
        num_tasks: the first so many of the held-out ones; how many seen ones (20 if None).
        trained: tasks of the generator's checkpoints; None: all that are not held out.

    Raises: ConfigError for a task that does not exist, or a set that is empty.
    """
    known = seen_tasks() if trained is None else tuple(sorted(set(trained)))
    if isinstance(tasks, str):
        require_choice("tasks", tasks, TASK_SETS)
        if tasks == "unseen":
            chosen = [task for task in HELD_OUT_TASKS if task not in known][:num_tasks]
            if not chosen:
                raise ConfigError(
                    "tasks=unseen: the generator was trained on all held-out tasks; give a list of tasks."
                )
        else:
            order = torch.randperm(len(known), generator=generator(seed, "seen tasks")).tolist()
            chosen = sorted(known[place] for place in order[: 20 if num_tasks is None else num_tasks])
    else:
        listed = [tasks] if isinstance(tasks, int) else list(tasks)
        chosen = [require_task(task, "tasks") for task in listed][:num_tasks]
    if not chosen:
        raise ConfigError("tasks=[] asks for nothing; give unseen, seen, or numbers from 1 to 1022.")
    return [Condition(tuple(map(float, task_bits(task))), f"class{task:04d}") for task in chosen]


def vector_conditions(vectors: Any, size: int) -> list[Condition]:
    """Conditions written out: one vector or a list of them; a task's is labelled with its number.

    Raises: ConfigError for a vector of another length, naming it.
    """
    rows = list(vectors)
    if rows and not isinstance(rows[0], list | tuple):
        rows = [rows]
    conditions = []
    for number, row in enumerate(rows):
        values = check_condition(row, size, f"vectors[{number}]")
        conditions.append(Condition(values, label_of_vector(values, f"vector{number:04d}")))
    if not conditions:
        raise ConfigError(f"vectors=[] asks for nothing; give a list of {size} numbers, or a list of such lists.")
    return conditions


def label_of_vector(values: Sequence[float], otherwise: str) -> str:
    """``class0793`` for the class vector of task 793, else ``otherwise``."""
    is_bits = len(values) == NUM_CLASSES and all(value in (0.0, 1.0) for value in values)
    if not is_bits or len(set(values)) == 1:
        return otherwise
    return f"class{task_of_vector(values):04d}"


def feature_conditions(path: str | Path, size: int) -> list[Condition]:
    """Conditions of a JSON file ``{label: [numbers]}``, as ``rpg.extract_conditions`` writes it.

    Raises: DataError for a file that is no such table; ConfigError for a vector of another length.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"features={path} is no readable JSON file ({error}).") from None
    if not isinstance(table, Mapping) or not table:
        raise DataError(f"features={path} must hold an object {{label: [numbers]}} with at least one entry.")
    return [
        Condition(check_condition(row, size, f"features={path}, {label!r}"), safe_label(Path(label).stem))
        for label, row in table.items()
    ]


def check_condition(values: Any, size: int, name: str) -> tuple[float, ...]:
    """``values`` as a condition.

    Raises: ConfigError unless they are ``size`` finite numbers.
    """
    numbers = list(values) if isinstance(values, list | tuple) else [values]
    wrong = [value for value in numbers if isinstance(value, bool) or not isinstance(value, int | float)]
    if wrong or len(numbers) != size or not all(map(math.isfinite, numbers)):
        reason = f"{wrong[0]!r} is no number" if wrong else f"{len(numbers)} entries"
        raise ConfigError(f"{name} has {reason}; the generator's condition has {size} finite numbers.")
    return tuple(map(float, numbers))


def safe_label(text: str, also: str = "") -> str:
    """``text`` with letters, digits, dots, dashes and the characters of ``also`` only, at most 60 of them."""
    kept = ".-" + also
    return "".join(letter if letter.isalnum() or letter in kept else "-" for letter in text)[:60].strip("-.") or "item"


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "")
