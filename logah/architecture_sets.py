"""Files of architectures, and the networks of each training step.

A file has one description per line (JSON Lines). Which networks a step trains on follows from (seed, step, place in
the meta-batch) alone, so a resumed run, or one on another number of processes, sees the same networks.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import RandomState

from common.errors import ConfigError, DataError
from common.report.page import write_atomically
from common.seeding import derive_seed
from logah.architecture_config import NetsSection
from logah.architecture_graphs import count_nodes
from logah.architectures import Architecture
from logah.generators import LAWS, PATCH_SIZES, draw_from_grid

MOST_ATTEMPTS = 1000
DATA_OPTIONS = {"vit": ("num_classes", "image_size"), "gpt2": ("vocab_size", "n_positions"), "llama": ("vocab_size",)}
"""What the data decide about a network, not its description."""


def write_architectures(path: Path, architectures: Iterable[Architecture], *, overwrite: bool = False) -> None:
    """Writes ``path``, whole or not at all.

    Raises: DataError if the file exists and ``overwrite`` is off, or it cannot be written.
    """
    if path.exists() and not overwrite:
        raise DataError(f"out={path} exists; add overwrite=true, or choose another file.")
    lines = [json.dumps(architecture.to_json(), sort_keys=True) + "\n" for architecture in architectures]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(lines).encode())
    except OSError as error:
        raise DataError(f"out={path} cannot be written ({error.strerror}); choose another file.") from None


def read_architectures(path: Path, limit: int | None = None) -> list[Architecture]:
    """The architectures of a file, at most ``limit``; blank lines are skipped.

    Raises: DataError for a missing or empty file, and for a broken line, with its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"nets.set={path} cannot be read ({error}); `python -m logah.generate_architectures` writes such files."
        ) from None
    found: list[Architecture] = []
    for number, line in enumerate(lines, 1):
        if limit is not None and len(found) == limit:
            break
        if not line.strip():
            continue
        try:
            described = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"nets.set={path}, line {number}: no JSON ({error}); repair or remove the line.") from None
        found.append(Architecture.from_json(described, where=f"nets.set={path}, line {number}"))
    if not found:
        raise DataError(
            f"nets.set={path} holds no architecture; write one with `python -m logah.generate_architectures`."
        )
    return found


class ArchitectureSource:
    """The networks of every training step.

    Args:
        section: options ``nets.*``.
        seed: of the run.
        data_options: what the data decide: ``num_classes`` and ``image_size``, or ``vocab_size`` and ``n_positions``;
            those that a family does not have are ignored.
        nodes_of: nodes of a network's graph, for the budget; None: traced with default options.

    Raises: DataError for a file that cannot be used; ConfigError for options that no network can have.
    """

    def __init__(
        self,
        section: NetsSection,
        *,
        seed: int,
        data_options: Mapping[str, Any] | None = None,
        nodes_of: Callable[[Architecture], int] | None = None,
    ) -> None:
        self.section, self.seed = section, seed
        self._data_options = dict(data_options or {})
        self._nodes_of = nodes_of or count_nodes
        self._listed = None
        if section.set is not None:
            listed = read_architectures(Path(section.set), section.num_nets)
            self._listed = [self._adapted(architecture) for architecture in listed]
        # the last ones: the slots of a step, and the steps of an epoch, are asked for one after the other
        self._order: tuple[int, np.ndarray] | None = None
        self._meta_batch: tuple[int, list[Architecture]] | None = None

    @property
    def listed(self) -> list[Architecture] | None:
        """Networks of the file, as they are drawn; None without one."""
        return self._listed

    def draw(self, step: int, slots: Sequence[int] | None = None) -> list[Architecture]:
        """Networks at places ``slots`` of the meta-batch of ``step``; None: all of it.

        A file's networks come in a new order every time all have come. If a meta-batch has more nodes than the budget,
        another one is drawn in its place (from anywhere in the file).

        Raises: ConfigError if none within the budget is found.
        """
        places = range(self.section.meta_batch) if slots is None else slots
        if self.section.effective_node_budget is None:
            return [self._draw(step, slot, attempt=0) for slot in places]
        if self._meta_batch is None or self._meta_batch[0] != step:
            self._meta_batch = step, self._draw_meta_batch(step)
        return [self._meta_batch[1][slot] for slot in places]

    def _draw_meta_batch(self, step: int) -> list[Architecture]:
        budget, fewest = self.section.effective_node_budget, None
        for attempt in range(MOST_ATTEMPTS):
            drawn = [self._draw(step, slot, attempt) for slot in range(self.section.meta_batch)]
            nodes = sum(self._nodes_of(architecture) for architecture in drawn)
            if nodes <= budget:
                return drawn
            fewest = nodes if fewest is None else min(fewest, nodes)
        raise ConfigError(
            f"nets.node_budget={budget} is too small for nets.meta_batch={self.section.meta_batch}: the smallest of "
            f"{MOST_ATTEMPTS} draws has {fewest} nodes. Raise it, or set it to 0 for no limit."
        )

    def _draw(self, step: int, slot: int, attempt: int) -> Architecture:
        if self._listed is None:
            return self._from_law(RandomState(derive_seed(self.seed, "nets", step, slot, attempt) % 2**32))
        if attempt:
            rng = RandomState(derive_seed(self.seed, "nets redrawn", step, slot, attempt) % 2**32)
            return self._listed[rng.randint(len(self._listed))]
        epoch, place = divmod(step * self.section.meta_batch + slot, len(self._listed))
        if self._order is None or self._order[0] != epoch:
            rng = RandomState(derive_seed(self.seed, "nets order", epoch) % 2**32)
            self._order = epoch, rng.permutation(len(self._listed))
        return self._listed[self._order[1][place]]

    def _from_law(self, rng: RandomState) -> Architecture:
        section = self.section
        family = section.drawn_family
        options = {name: self._data_options[name] for name in DATA_OPTIONS[family] if name in self._data_options}
        options |= section.dropout_options(family)
        if family == "vit" and section.patch_sizes is not None:
            options["patch_sizes"] = section.patch_sizes
        if section.law != "grid":
            return LAWS[section.law](rng, **options)
        if family == "vit":
            options.setdefault("patch_sizes", PATCH_SIZES.get(options.get("image_size"), (2,)))
        return draw_from_grid(
            rng, family, depths=section.depths, widths=section.widths, heads=section.heads,
            mlp_ratios=section.mlp_ratios, **options,
        )  # fmt: skip

    def _adapted(self, architecture: Architecture) -> Architecture:
        """``architecture`` with the classes, pixels or vocabulary of the data."""
        names = DATA_OPTIONS.get(architecture.family, ())
        options = {name: self._data_options[name] for name in names if name in self._data_options}
        if architecture.family in ("torchvision", "timm"):
            options = {name: value for name, value in self._data_options.items() if name == "num_classes"}
        if architecture.family == "vit" and self.section.patch_sizes is not None and len(self.section.patch_sizes) == 1:
            options["patch_size"] = self.section.patch_sizes[0]
        options |= self.section.dropout_options(architecture.family) if architecture.family in DATA_OPTIONS else {}
        return Architecture(architecture.family, {**architecture.options, **options})
