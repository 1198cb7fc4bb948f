"""Collections of checkpoints on real digits, written as a user's would be, and their description."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from rpg.checkpoint_files import read_checkpoint, write_checkpoint
from rpg.reproduction.settings import Settings
from rpg.similarity import ValueSample, pairwise_distances
from rpg.tasks import CheckpointName, parse_name
from rpg.zoo import digit_tasks, digits

State = dict[str, Tensor]
UNSEEN = "unseen"  # folder beside the seen tasks' checkpoints


def write_all(named: Iterable[tuple[CheckpointName, State]], folder: Path) -> list[float]:
    """Writes checkpoints under their names; the accuracies. Those of an interrupted attempt are written again."""
    accuracies = []
    for name, state in named:
        write_checkpoint(folder / name.file_name(".safetensors"), state, overwrite=True)
        accuracies.append(name.accuracy)
    return accuracies


def read_all(folder: Path) -> list[tuple[CheckpointName, State]]:
    """All checkpoints of a folder by name: in the order of trainings and steps."""
    found = [(parse_name(path), read_checkpoint(path)) for path in sorted(folder.glob("*.safetensors"))]
    return sorted(found, key=lambda item: (item[0].value or 0, item[0].index))


def values_of(states: Iterable[State], sample: ValueSample | None = None) -> Tensor:
    """(K, V) floating-point values of networks."""
    listed = list(states)
    sample = sample or ValueSample(listed[0], len(listed))
    return sample.matrix((("a network", state) for state in listed), len(listed))


def describe_trajectory(states: list[State]) -> dict:
    """Distances of consecutive checkpoints and of all pairs of one training."""
    values_KV = values_of(states)
    distance_KK = pairwise_distances(values_KV, values_KV)
    count = len(states)
    return {
        "consecutive": float(distance_KK.diagonal(1).mean()),
        "pair": float(distance_KK.triu(1).sum() / (count * (count - 1) / 2)),
    }


def collect_digits(settings: dict, seed: int, folder: str) -> dict:
    """One training; its last states, one per step."""
    chosen = Settings.from_dict(settings)
    recipe = digits.DigitRecipe(epochs=chosen.epochs, num_checkpoints=chosen.checkpoints)
    accuracies = write_all(digits.named_networks(seed, recipe), Path(folder))
    states = [state for _, state in read_all(Path(folder))]
    return {"accuracy": accuracies, **describe_trajectory(states)}


def collect_seeds(settings: dict, seed: int, folder: str) -> dict:
    """Several independent trainings of the same network."""
    chosen = Settings.from_dict(settings)
    recipe = digits.DigitRecipe(epochs=chosen.epochs, num_checkpoints=chosen.checkpoints_each)

    def named() -> Iterator[tuple[CheckpointName, State]]:
        for training in range(chosen.trainings):
            # trainings of one reproduction and of the next one's seeds do not overlap
            yield from digits.named_networks(chosen.trainings * seed + training, recipe, by_seed=True)

    accuracies = write_all(named(), Path(folder))
    states = [state for _, state in read_all(Path(folder))]
    ends = values_of(states[chosen.checkpoints_each - 1 :: chosen.checkpoints_each])
    distance_SS = pairwise_distances(ends, ends)
    apart = float(distance_SS.triu(1).sum() / max(1, len(ends) * (len(ends) - 1) // 2))
    return {"accuracy": accuracies, "apart": apart, **describe_trajectory(states[: chosen.checkpoints_each])}


def collect_tasks(settings: dict, seed: int, folder: str) -> dict:
    """Networks of seen tasks in ``folder``, the last ones of unseen tasks in the folder beside it."""
    chosen = Settings.from_dict(settings)
    seen, unseen = digit_tasks.choose_tasks(chosen.seen, chosen.unseen, seed)
    recipe = digit_tasks.DigitTaskRecipe(steps=chosen.task_steps, num_checkpoints=chosen.task_checkpoints)
    named = list(digit_tasks.named_networks([*seen, *unseen], seed, recipe))
    hidden = set(unseen)
    accuracy_seen = write_all((pair for pair in named if pair[0].task not in hidden), Path(folder))
    last = [pair for pair in named if pair[0].task in hidden and pair[0].index == chosen.task_checkpoints]
    accuracy_unseen = write_all(last, unseen_folder(Path(folder)))
    values_TV = values_of(state for name, state in named if name.index == chosen.task_checkpoints)
    deviation_V = values_TV.std(0)
    return {
        "accuracy": accuracy_seen,
        "accuracy_unseen": accuracy_unseen,
        # the task signal: spread of a value over tasks, in deviations of the values of a network
        "spread": float((deviation_V.square().mean() / values_TV.var(1).mean()).sqrt()),
    }


def unseen_folder(seen: Path) -> Path:
    """Where the trained networks of unseen tasks lie: never inside what a generator learns from."""
    return seen.with_name(f"{seen.name}-{UNSEEN}")


def target_labels() -> Tensor:
    """Digits of the test images, (N,)."""
    return digits.load_images().test_label_N


def wrong_of(states: Iterable[State]) -> Tensor:
    """(K, N) bool: test digits that each network gets wrong."""
    tester = digits.DigitTester()
    predicted_KN = torch.stack([tester.predict(state)[0] for state in states])
    return predicted_KN != tester.classes_N
