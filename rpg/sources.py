"""Which networks share what the stack sees: a source is one distinct pair of permutation state and condition.

The stack knows the state and the condition of a network and nothing of its weights, so it needs to run once per source
of a batch, and a token made from a prototype may be compared with the token of any network of that source.

Dimensions: K networks, S sources, E numbers of a condition.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sources:
    """The sources of K networks.

    Attributes:
        source_K: which source each network belongs to.
        state_S: permutation state of each source; None: no states.
        condition_SE: condition of each source; None: none.
        start_S, size_S, members_K: the networks of source s are ``members_K[start_S[s] : start_S[s] + size_S[s]]``.
    """

    source_K: Tensor
    state_S: Tensor | None
    condition_SE: Tensor | None
    start_S: Tensor
    size_S: Tensor
    members_K: Tensor

    def __len__(self) -> int:
        return len(self.size_S)

    def members(self, source_R: Tensor, uniform_R: Tensor) -> Tensor:
        """A network of each source, chosen by a uniform number in [0, 1)."""
        size_R = self.size_S[source_R]
        place_R = (uniform_R * size_R).long().clamp(max=size_R - 1)
        return self.members_K[self.start_S[source_R] + place_R]


def find_sources(group_K: Tensor, condition_KE: Tensor | None, *, use_states: bool) -> Sources:
    """Distinct (state, condition) pairs in order of their first network."""
    keys = [
        (int(group) if use_states else 0, () if condition_KE is None else tuple(condition_KE[index].tolist()))
        for index, group in enumerate(group_K)
    ]
    numbers: dict[tuple, int] = {}
    source_K = torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])
    size_S = torch.bincount(source_K)
    members_K = torch.argsort(source_K, stable=True)
    start_S = size_S.cumsum(0) - size_S
    first_S = members_K[start_S]
    return Sources(
        source_K=source_K,
        state_S=group_K[first_S] if use_states else None,
        condition_SE=None if condition_KE is None else condition_KE[first_S],
        start_S=start_S,
        size_S=size_S,
        members_K=members_K,
    )
