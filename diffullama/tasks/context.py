"""What every task gets and gives: the model with its text side, groups of items, and an outcome.

A task divides its items into *groups* that do not depend on the number of processes; a group is computed by one process
and kept on disk, so that an interrupted evaluation continues.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from common.data.tokenizer import Tokenizer
from common.errors import DataError
from common.evaluation.masked_model import beginning_id, leading_ids
from common.evaluation.metric import Metric
from common.precision import autocast
from diffullama.autoregressive import continue_causally
from diffullama.model import DiffusionLM
from diffullama.special_tokens import SpecialTokens


@dataclass(frozen=True)
class Context:
    """The model that is evaluated, and how texts become its ids.

    Attributes:
        model: in eval mode.
        causal: the autoregressive baseline is evaluated, not the diffusion model.
        max_length: longest sequence that may be formed.
        bos: ``auto`` puts before a text what the tokenizer does itself, ``always`` a beginning-of-text token.
        precision: of network calls that do not go through ``model.forward``.
        seed: of everything random.
        batch_size: network rows per forward pass.
        group_size: items of a group.
        cache_dir: of downloads.
    """

    model: DiffusionLM
    tokenizer: Tokenizer
    special: SpecialTokens
    causal: bool = False
    max_length: int = 1024
    bos: str = "auto"
    precision: str = "fp32"
    seed: int = 0
    batch_size: int = 64
    group_size: int = 16
    cache_dir: str | None = None

    def continue_causally(self, prefixes: Sequence[Sequence[int]], count: int, **options: Any) -> list[list[int]]:
        """New ids after equally long prefixes by the autoregressive parent, see ``autoregressive.py``."""
        prefix_BL = row_tensor(prefixes, self.model.device)
        with autocast(self.precision, self.model.device):
            return continue_causally(self.model, prefix_BL, count, **options).tolist()

    @property
    def leading(self) -> list[int]:
        """Ids before every text that begins a sequence."""
        return [self.beginning] if self.bos == "always" else leading_ids(self.tokenizer)

    @property
    def beginning(self) -> int:
        """The id before a text that has nothing else before it."""
        return beginning_id(self.tokenizer) if self.special.bos_id is None else self.special.bos_id

    def prefix_ids(self, text: str) -> list[int]:
        """Ids of a text that begins a sequence; never empty."""
        return [*self.leading, *self.tokenizer.encode(text)] or [self.beginning]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of generated ids; those without text (embedding rows beyond the tokenizer's) are left out."""
        return self.tokenizer.decode([token for token in ids if token < self.tokenizer.vocab_size])

    def cut_prefix(self, ids: list[int], free: int) -> list[int]:
        """``ids`` without so many of its first text tokens that ``free`` more fit; the leading ids stay.

        Raises: DataError if not even one text token fits.
        """
        room = self.max_length - free
        if len(ids) <= room:
            return ids
        lead = len(self.leading)
        if room <= lead:
            raise DataError(
                f"{free} tokens to score or fill leave no room for a prefix in max_length={self.max_length}."
            )
        return ids[:lead] + ids[len(ids) - (room - lead) :]


@dataclass(frozen=True)
class Outcome:
    """What a task found.

    Attributes:
        metrics: with standard errors.
        items: one JSON-able record per item, in the order of the data.
        facts: further numbers, counts first.
        notes: what a reader must know before comparing.
        exports: further files, name suffix -> records, such as the format of an official scorer.
    """

    metrics: list[Metric]
    items: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    exports: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


class Evaluation(Protocol):
    """One task on one model."""

    settings: Mapping[str, Any]  # everything beside model and seed that decides the values

    @property
    def num_groups(self) -> int:
        """Groups there are."""

    def run(self, group: int) -> dict[str, Any]:
        """A group's JSON-able record."""

    def summary(self, records: Sequence[Mapping[str, Any]]) -> Outcome:
        """The outcome from all groups' records, in order."""


def grouped(keys: Sequence[Any], size: int, *, alike: bool = False) -> list[list[int]]:
    """Numbers of the items, those with close keys together, in groups of at most ``size``.

    Args:
        keys: one sortable key per item, such as its length.
        alike: never two different keys in one group.
    """
    order = sorted(range(len(keys)), key=lambda index: (keys[index], index))
    groups: list[list[int]] = []
    for index in order:
        if groups and len(groups[-1]) < size and not (alike and keys[groups[-1][0]] != keys[index]):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def by_item(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The items of all groups' records in their order; a record holds them under ``items``."""
    found = {int(item["item"]): dict(item) for record in records for item in record["items"]}
    return [found[number] for number in sorted(found)]


def row_tensor(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Equally long rows of ids on a device."""
    return torch.tensor([list(row) for row in rows], dtype=torch.int64, device=device)
