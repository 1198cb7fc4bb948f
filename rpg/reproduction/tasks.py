"""The conditional experiment: networks for seen and unseen digit tasks, drawn from ten bits, and their baselines.

Letters: T tasks, N test images, V values.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from common.seeding import generator
from rpg.baselines import RidgeRegression, mean_state, perturb
from rpg.loading import load_generator
from rpg.reproduction.collection import State, read_all, target_labels, unseen_folder, values_of
from rpg.reproduction.scoring import draw_states
from rpg.reproduction.settings import Settings
from rpg.requests import Request
from rpg.similarity import pairwise_distances
from rpg.tasks import class_vectors, majority_rate, task_bits
from rpg.zoo.digit_tasks import predictions, targets

SEEN, UNSEEN = "seen", "unseen"
TRAINED, NOISED, MEAN, MAJORITY = "trained networks", "trained + noise", "mean network", "always the majority"
RIDGE, RIDGE_PRODUCTS = "ridge regression", "ridge regression, products of bits"


def tasks_to_draw(settings: Settings, folder: str, seed: int) -> dict[str, list[int]]:
    """Some seen tasks, and unseen ones."""
    seen = sorted({name.task for name, _ in read_all(Path(folder))})
    unseen = sorted(name.task for name, _ in read_all(unseen_folder(Path(folder))))
    order = torch.randperm(len(seen), generator=generator(seed, "drawn tasks")).tolist()
    chosen = sorted(seen[place] for place in order[: settings.drawn_tasks])
    return {SEEN: chosen, UNSEEN: unseen[: settings.drawn_tasks]}


def accuracy_of(states: list[State], tasks: list[int]) -> list[float]:
    """Accuracy of each network at its task."""
    correct_TN = predictions(states) == targets(tasks, target_labels())
    return correct_TN.double().mean(1).tolist()


def other_task_accuracy(states: list[State], tasks: list[int]) -> list[float]:
    """Mean accuracy of each network at all other tasks of the list: what it does without the right condition.

    All of them, because neighbouring task numbers share most of their bits.
    """
    answers_TN, right_TN = predictions(states), targets(tasks, target_labels())
    agreement_TT = torch.stack([(answers_N == right_TN).double().mean(1) for answers_N in answers_TN])
    others = len(tasks) - 1
    return ((agreement_TT.sum(1) - agreement_TT.diagonal()) / others).tolist() if others else [math.nan]


def trained_of(tasks: list[int], folder: Path) -> list[State]:
    """The last trained network of each task."""
    last = {name.task: state for name, state in read_all(folder)}  # in the order of steps
    return [last[task] for task in tasks]


def score_tasks(settings: dict, arm: str, draw: str, seed: int, run_dir: str, folder: str) -> dict:
    """One network for each of some seen and of the unseen tasks: a number per task."""
    chosen = Settings.from_dict(settings)
    how = next(each for each in chosen.arm(arm).draws if each.name == draw)
    loaded = load_generator(run_dir)
    wanted = tasks_to_draw(chosen, folder, seed)
    listed = [task for tasks in wanted.values() for task in tasks]
    requests = [
        Request(index=index, state=None, condition=tuple(map(float, task_bits(task))), label=f"class{task:04d}")
        for index, task in enumerate(listed)
    ]
    states, seconds = draw_states(loaded, requests, how, seed)
    originals_KV = values_of(state for _, state in read_all(Path(folder)))
    found: dict = {"seconds": seconds}
    for name, tasks in wanted.items():
        own, states = states[: len(tasks)], states[len(tasks) :]
        trained = trained_of(tasks, Path(folder) if name == SEEN else unseen_folder(Path(folder)))
        values_TV, trained_TV = values_of(own), values_of(trained)
        found[name] = {
            "tasks": tasks,
            "accuracy": accuracy_of(own, tasks),
            "other_task": other_task_accuracy(own, tasks),
            "majority": [majority_rate(target_labels(), task) for task in tasks],
            "to_nearest_original": least_distance(values_TV, originals_KV),
            "to_trained": (values_TV - trained_TV).norm(dim=1).tolist(),
            "trained_to_nearest_original": least_distance(trained_TV, originals_KV),
        }
    return found


def least_distance(values_TV: Tensor, others_KV: Tensor) -> list[float]:
    """Distance of every network to the nearest of the others."""
    return pairwise_distances(values_TV, others_KV).min(1).values.tolist()


def score_task_baselines(settings: dict, seed: int, folder: str) -> dict:
    """What is reached without a generator, on the same tasks: group -> seen or unseen -> accuracies."""
    chosen = Settings.from_dict(settings)
    named = read_all(Path(folder))
    states = [state for _, state in named]
    conditions_KC = class_vectors([name.task for name, _ in named])
    regressions = {
        RIDGE: RidgeRegression(conditions_KC, states),
        RIDGE_PRODUCTS: RidgeRegression(conditions_KC, states, products=True),
    }
    mean = mean_state(states)
    found: dict[str, dict[str, list[float]]] = {}
    for name, tasks in tasks_to_draw(chosen, folder, seed).items():
        trained = trained_of(tasks, Path(folder) if name == SEEN else unseen_folder(Path(folder)))
        draws = generator(seed, f"noised task networks, {name}")
        groups: Mapping[str, list[State]] = {
            TRAINED: trained,
            NOISED: [perturb(state, chosen.task_noise, draws) for state in trained],
            MEAN: [mean] * len(tasks),
            **{label: [fitted.predict(task_bits(task)) for task in tasks] for label, fitted in regressions.items()},
        }
        for label, group in groups.items():
            found.setdefault(label, {})[name] = accuracy_of(group, tasks)
        found.setdefault(MAJORITY, {})[name] = [majority_rate(target_labels(), task) for task in tasks]
    return found
