"""Drawing digit networks from a trained generator, and scoring them next to what they must be compared with.

Every group of networks is scored alike: accuracy on the 1000 test digits, IoU of its errors with those of the most
similar original, distance to the nearest original; a number per network, so that all errors can be computed from them.

Letters: K originals, G networks of another group, N test images, V values of a network.
"""

import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from common.seeding import generator
from rpg.baselines import interpolations, mean_state, perturb
from rpg.generation import generate
from rpg.loading import LoadedGenerator, load_generator
from rpg.novelty import iou_matrix, largest_iou
from rpg.reproduction.collection import State, read_all, values_of, wrong_of
from rpg.reproduction.settings import Draw, Settings
from rpg.requests import Request, build_requests
from rpg.sampling import SamplerConfig
from rpg.similarity import ValueSample, pairwise_distances

ORIGINALS, MEAN, INTERPOLATED = "originals", "mean of originals", "interpolated"


class Originals:
    """The checkpoints that a generator learned from: their errors and values."""

    def __init__(self, folder: str) -> None:
        self.names, self.states = zip(*read_all(Path(folder)), strict=True)
        self.wrong_KN = wrong_of(self.states)
        self.sample = ValueSample(self.states[0], len(self.states))
        self.values_KV = values_of(self.states, self.sample)

    def score(self, states: Iterable[State], *, are_originals: bool = False) -> dict:
        """Accuracy, IoU with the most similar original and distance to the nearest one, a number per network."""
        listed = list(states)
        wrong_GN = self.wrong_KN if are_originals else wrong_of(listed)
        values_GV = values_of(listed, self.sample)
        distance_GK = pairwise_distances(values_GV, self.values_KV)
        if are_originals:  # of an original: the others
            distance_GK.fill_diagonal_(torch.inf)
        similarity_G = largest_iou(iou_matrix(wrong_GN, self.wrong_KN), same_group=are_originals)
        return {
            "accuracy": (1 - wrong_GN.double().mean(1)).tolist(),
            "similarity": similarity_G.tolist(),
            "distance": distance_GK.min(1).values.tolist(),
            "apart": mean_pair(values_GV),
            "nearest": [str(self.names[place]) for place in distance_GK.argmin(1).tolist()],
        }


def mean_pair(values_GV: Tensor) -> float | None:
    """Mean distance of two networks of a group, None for one: near 0 for a generator that always draws the same."""
    count = len(values_GV)
    if count < 2:
        return None
    return float(pairwise_distances(values_GV, values_GV).triu(1).sum() / (count * (count - 1) / 2))


def noise_name(level: float) -> str:
    """Name of the group of originals with noise of that many deviations of each tensor."""
    return f"originals + noise {level:g}"


def score_baselines(settings: dict, seed: int, folder: str) -> dict:
    """Groups made of the originals without any generator: group name -> scores."""
    chosen = Settings.from_dict(settings)
    originals = Originals(folder)
    states = originals.states
    order = torch.randperm(len(states), generator=generator(seed, "noised originals")).tolist()

    def noised(level: float) -> list[State]:
        draws = generator(seed, f"noise {level:g}")
        return [perturb(states[order[index % len(states)]], level, draws) for index in range(chosen.noised)]

    groups = {ORIGINALS: originals.score(states, are_originals=True)}
    groups |= {noise_name(level): originals.score(noised(level)) for level in chosen.noise_levels}
    groups[MEAN] = originals.score([mean_state(states)])
    between = interpolations(states, chosen.pairs, generator(seed, "interpolated pairs"))
    groups[INTERPOLATED] = originals.score(between)
    return groups


def requests_of(loaded: LoadedGenerator, count: int, seed: int) -> list[Request]:
    """Networks over all permutation states in turn, or over random ones if there are more states than networks."""
    groups = loaded.groups
    states = "none" if not groups else "balanced" if len(groups) <= count else "random"
    return build_requests(None, count, seed=seed, states=states, groups=groups)


def draw_states(loaded: LoadedGenerator, requests: list[Request], draw: Draw, seed: int) -> tuple[list[State], float]:
    """The networks of all requests, and processor seconds (one thread) per network."""
    sampler = SamplerConfig(kind=draw.kind, steps=draw.steps, eta=draw.eta)
    began = time.process_time()
    states = [state for _, state in generate(loaded, requests, sampler, seed=seed)]
    return states, (time.process_time() - began) / len(states)


def score_draw(settings: dict, arm: str, draw: str, seed: int, run_dir: str, folder: str) -> dict:
    """Networks drawn from one generator with one sampler, scored."""
    chosen = Settings.from_dict(settings).arm(arm)
    how = next(each for each in chosen.draws if each.name == draw)
    loaded = load_generator(run_dir)
    states, seconds = draw_states(loaded, requests_of(loaded, how.networks, seed), how, seed)
    return {**Originals(folder).score(states), "seconds": seconds}
