"""Ensembles: are several generated networks together better than one, as several trained ones are?

The answer of an ensemble is the class with the largest mean logit of its members.

Dimensions: N test samples, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.errors import ConfigError, DataError
from rpg.candidates import Network
from rpg.predictions import Prediction, PredictionCache, state_hash
from rpg.testing import Tester


@dataclass(frozen=True)
class Ensemble:
    """Accuracy of ``members`` networks together."""

    name: str
    members: int
    accuracy: float


def ensemble_prediction(tester: Tester, networks: Sequence[Network]) -> Prediction:
    """The class of the largest mean logit; one network in memory at a time.

    Raises: ConfigError if the tester has no logits; DataError if members are tested on different samples.
    """
    total_NC, first_N = torch.zeros(()), None
    for network in networks:
        with torch.no_grad():
            logits_NC, target_N = tester.logits(network.load(), task=network.task)
        if first_N is not None and not torch.equal(target_N, first_N):
            raise DataError(
                f"{network.name} is tested on other samples or targets than {networks[0].name}; an ensemble needs "
                "members that answer the same question."
            )
        total_NC, first_N = total_NC + logits_NC.double(), target_N
    return Prediction(total_NC.argmax(-1), first_N)


def compute_ensemble(tester: Tester, cache: PredictionCache, networks: Sequence[Network], name: str) -> Ensemble | None:
    """Accuracy of the ensemble of ``networks``, remembered by the members' contents; None if the tester has no logits.

    Raises: DataError if members are tested on different samples.
    """
    key = f"ensemble {[state_hash(network.load()) for network in networks]} task={networks[0].task}"
    found = cache.find(key)
    if found is None:
        try:
            found = ensemble_prediction(tester, networks)
        except ConfigError:  # a tester that only predicts
            return None
        cache.store(key, found)
    return Ensemble(name, len(networks), found.accuracy)
