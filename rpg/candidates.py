"""The networks that an evaluation compares: originals, generated ones, and the baselines made of the originals.

Nothing is held in memory: a ``Network`` knows how to read or make its state dict when it is looked at.

Baselines belong to a task where the originals do: noise and interpolation keep the task of their original, while the
mean and the regressions are made for the tasks of the generated networks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from common.errors import DataError
from common.seeding import generator
from rpg.baselines import RidgeRegression, State, interpolate, mean_state, perturb, random_pairs
from rpg.checkpoint_files import find_checkpoints, names_of, read_checkpoint
from rpg.novelty import GENERATED, ORIGINAL
from rpg.tasks import class_vector, class_vectors, task_in_name

HELD_OUT = "held out"
UNSEEN = " (unseen tasks)"  # ends the names of groups of networks for tasks that no original has
MEAN, INTERPOLATED, MEAN_GENERATED = "mean of originals", "interpolated", "mean of generated"
RIDGE, RIDGE_PAIRS = "ridge regression", "ridge regression with pairs"


@dataclass(frozen=True)
class Network:
    """One network.

    Attributes:
        name: unique within its group; the file's name where there is one.
        load: makes the state dict.
        task: the binary task that it shall solve, where there are tasks.
        path: its file or adapter folder, if it has one.
    """

    name: str
    load: Callable[[], State]
    task: int | None = None
    path: Path | None = None


Groups = dict[str, list[Network]]


def from_folder(folder: str | Path, option: str, pattern: str | None = None, limit: int | None = None) -> list[Network]:
    """A network per checkpoint file or adapter folder, sorted; tasks from their names.

    Args:
        option: which option named the folder.
        limit: so many of them, evenly spaced.

    Raises: DataError if there is none; CheckpointError if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{option}={folder} is no folder; give the folder that holds the networks.")
    paths = find_checkpoints(folder, pattern)
    if not paths:
        raise DataError(
            f"{option}={folder} holds no checkpoint{f' that fits pattern={pattern}' if pattern else ''}; give a folder "
            "with .pth or .safetensors files or adapters' folders."
        )
    named = list(zip(names_of(paths, folder), paths, strict=True))
    if limit is not None and limit < len(named):
        named = [named[round(place * (len(named) - 1) / max(limit - 1, 1))] for place in range(limit)]
    return [Network(name, _reader(path), task_in_name(path), path) for name, path in named]


def _reader(path: Path) -> Callable[[], State]:
    return lambda: read_checkpoint(path)


def noise_group(level: float) -> str:
    """Name of the group of originals with noise of this intensity."""
    return f"noise {level:g}"


def noised(originals: Sequence[Network], level: float, repeats: int, *, seed: int) -> list[Network]:
    """``repeats`` originals, drawn without replacement as far as they go, each with noise of its own."""

    def make(original: Network, repeat: int) -> Callable[[], State]:
        return lambda: perturb(original.load(), level, generator(seed, f"noise {level:g}", repeat))

    order = torch.randperm(len(originals), generator=generator(seed, "noised_originals")).tolist()
    chosen = [originals[order[repeat % len(order)]] for repeat in range(repeats)]
    return [
        Network(f"{original.name} + noise {level:g} #{repeat}", make(original, repeat), original.task)
        for repeat, original in enumerate(chosen)
    ]


def interpolated(originals: Sequence[Network], count: int, *, seed: int) -> list[Network]:
    """Networks half-way between random pairs of originals (of one task, where there are tasks)."""

    def make(one: Network, other: Network) -> Callable[[], State]:
        return lambda: interpolate(one.load(), other.load(), 0.5)

    pairs = random_pairs(len(originals), count, generator(seed, "interpolated_pairs"))
    chosen = [(originals[i], originals[j]) for i, j in pairs]
    return [Network(f"between {one.name} and {other.name}", make(one, other), one.task) for one, other in chosen]


def averaged(networks: Sequence[Network], name: str, tasks: Sequence[int | None] = (None,)) -> list[Network]:
    """The mean of all networks, as a candidate for each task; computed once, when first asked for."""
    load = cache(lambda: mean_state(network.load() for network in networks))
    return [Network(name if task is None else f"{name} for task {task}", load, task) for task in tasks]


def regressed(originals: Sequence[Network], tasks: Sequence[int], *, products: bool, penalty: float) -> list[Network]:
    """Ridge regression from class vectors to weights, fitted to the originals, for each task.

    Raises: DataError if the originals' names tell no tasks.
    """
    without = [network.name for network in originals if network.task is None]
    if without:
        raise DataError(
            f"{without[0]} has no task in its name (..._class0793...), which the regression from class vectors to "
            "weights needs; set regression=false."
        )

    @cache
    def fitted() -> RidgeRegression:
        conditions_KC = class_vectors([network.task for network in originals])
        return RidgeRegression(
            conditions_KC, (network.load() for network in originals), products=products, penalty=penalty
        )

    def make(task: int) -> Callable[[], State]:
        return lambda: fitted().predict(class_vector(task))

    name = RIDGE_PAIRS if products else RIDGE
    return [Network(f"{name} for task {task}", make(task), task) for task in tasks]


def tasks_of(networks: Sequence[Network]) -> list[int]:
    """Tasks of the networks, each once, ascending."""
    return sorted({network.task for network in networks if network.task is not None})


def build_groups(
    originals: Sequence[Network],
    generated: Sequence[Network],
    held_out: Sequence[Network] = (),
    *,
    seed: int,
    noise_levels: Sequence[float] = (),
    noise_repeats: int = 5,
    mean: bool = True,
    interpolations: int = 0,
    regression: bool = False,
    penalty: float = 1.0,
) -> Groups:
    """Originals, generated networks and the baselines asked for, in the order in which they are reported.

    Interpolation is left out for task networks, whose task it would blur; regressions are made for task networks only.
    """
    groups: Groups = {ORIGINAL: list(originals), GENERATED: list(generated), HELD_OUT: list(held_out)}
    tasks = tasks_of([*originals, *generated])
    wanted = tasks_of(generated) or tasks
    if originals:
        for level in noise_levels:
            groups[noise_group(level)] = noised(originals, level, noise_repeats, seed=seed)
        if mean and len(originals) > 1:
            groups[MEAN] = averaged(originals, MEAN, wanted or (None,))
        if interpolations and len(originals) > 1 and not tasks:
            groups[INTERPOLATED] = interpolated(originals, interpolations, seed=seed)
        if regression and tasks:
            for products, name in ((False, RIDGE), (True, RIDGE_PAIRS)):
                groups[name] = regressed(originals, wanted, products=products, penalty=penalty)
    if mean and len(generated) > 1 and not tasks:
        groups[MEAN_GENERATED] = averaged(generated, MEAN_GENERATED)
    return {name: networks for name, networks in groups.items() if networks}


def split_by_task(groups: Groups) -> Groups:
    """Groups of task networks in two: tasks that the originals have, and ``unseen`` ones; the originals stay whole."""
    seen = set(tasks_of(groups.get(ORIGINAL, ())))
    found: Groups = {}
    for name, networks in groups.items():
        if name == ORIGINAL or not seen:
            found[name] = networks
            continue
        known = [network for network in networks if network.task in seen]
        found |= {name: known, f"{name}{UNSEEN}": [network for network in networks if network.task not in seen]}
    return {name: networks for name, networks in found.items() if networks}
