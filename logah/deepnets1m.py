"""DeepNets-1M, the million convolutional architectures that GHN-2 and GHN-3 were trained on.

A split is an HDF5 file of graphs (``deepnets1m_train.hdf5``, ``deepnets1m_search.hdf5``, or ``deepnets1m_eval.hdf5``
for the others) and, beside it, a JSON file of the same stem with ``_meta`` that says how each network is built:

    /SPLIT/INDEX/adj      (N, N) lengths of shortest paths     /SPLIT/INDEX/nodes    (N, 3 or more) numbers: kind of
                                                               operation, cell, name
    {SPLIT: {"nets": [{"genotype", "n_cells", ...}], "meta": {"primitives_ext", "unique_op_names"}}}

``logah/deepnets1m_network.py`` builds the networks.

Dimensions: N nodes.

Source: Knyazev et al., Parameter Prediction for Unseen Deep Architectures (2021), and its public loader.
"""

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigError, DataError
from logah.net_graph import NetGraph, Node
from logah.primitives import NUM_PRIMITIVES, NUMBER

SPLITS = ("train", "val", "test", "search", "wide", "deep", "dense", "bnfree")
OWN_FILES = ("train", "search")
POOL_SHAPE = (1, 1, 3, 3)  # every pool of the set
LISTED = ("conv", "pool", "bias", "bn", "ln", "pos_enc")
ARGUMENTS = (
    "norm", "ks", "preproc", "glob_avg", "stem_pool", "C_mult", "n_cells", "fc_layers", "C", "fc_dim", "stem_type",
)  # fmt: skip
CHANNELS = tuple(range(32, 129, 16))
HIDDEN_UNITS = tuple(range(64, 513, 64))
WIDE_FACTOR = {"cifar10": 4, "imagenet": 2}


@dataclass(frozen=True)
class DeepNet:
    """One architecture.

    Attributes:
        graph: without shapes of parameters; ``with_shapes`` reads them from the network.
        options: of ``deepnets1m_network.DeepNetwork`` except the classes and the image size.
        index: in its split.
    """

    graph: NetGraph
    options: dict[str, Any]
    index: int


class DeepNets1M:
    """One split, read from disk an architecture at a time; workers open the file for themselves.

    Args:
        folder: with the HDF5 and the JSON file.
        ve_cutoff: longest path that is a virtual edge.
        images: ``cifar10`` or ``imagenet``: the widths of the networks depend on it.

    Raises: ConfigError for an unknown split; DataError for files that are missing or damaged.
    """

    def __init__(
        self, folder: Path | str, split: str = "train", *, ve_cutoff: int = 50, images: str = "cifar10"
    ) -> None:
        if split not in SPLITS:
            raise ConfigError(f"split={split!r} of DeepNets-1M is not known; choose one of {', '.join(SPLITS)}.")
        if images not in WIDE_FACTOR:
            raise ConfigError(f"images={images!r} must be one of {', '.join(WIDE_FACTOR)}.")
        stem = f"deepnets1m_{split if split in OWN_FILES else 'eval'}"
        self.path = Path(folder, f"{stem}.hdf5")
        self.split, self.ve_cutoff, self.images = split, ve_cutoff, images
        meta_path = Path(folder, f"{stem}_meta.json")
        for path in (self.path, meta_path):
            if not path.is_file():
                raise DataError(
                    f"{path} is missing; download DeepNets-1M (github.com/facebookresearch/ppuda) into {folder}."
                )
        try:
            meta = json.loads(meta_path.read_text(encoding="utf-8"))[split]
            self.networks: list[dict[str, Any]] = meta["nets"]
            self._kinds = {int(number): name for number, name in meta["meta"]["primitives_ext"].items()}
            self._names = {int(number): name for number, name in meta["meta"]["unique_op_names"].items()}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{meta_path} holds no split {split!r} ({error}); download it again.") from None
        self._file: Any = None

    def __len__(self) -> int:
        return len(self.networks)

    @property
    def num_nodes(self) -> list[int]:
        """Nodes of every graph, for a budget of nodes per batch."""
        return [network["num_nodes"] for network in self.networks]

    def __getitem__(self, index: int) -> DeepNet:
        """Architecture ``index``; ``C`` and ``fc_dim`` of the training split are missing until ``draw_widths``."""
        if not 0 <= index < len(self):
            raise IndexError(f"split {self.split} of DeepNets-1M has {len(self)} architectures, not number {index}")
        described = self.networks[index]
        adjacency_NN, nodes = self._arrays(index)
        options = {name: described[name] for name in ARGUMENTS if name in described}
        options["genotype"] = described["genotype"]
        if self.split == "wide":
            options["C"] *= WIDE_FACTOR[self.images]
        return DeepNet(self._graph(adjacency_NN, nodes, index), options, index)

    def draw_widths(self, net: DeepNet, rng: np.random.RandomState) -> dict[str, Any]:
        """The options of ``net`` with channels and hidden units drawn as in training: narrow for expensive networks."""
        described, genotype = self.networks[net.index], net.options["genotype"]
        millions = described["num_params"][self.images] / 1e6
        names = [name for name, _ in [*genotype["normal"], *genotype["reduce"]]]
        large_kernels = any(name in ("conv_5x5", "conv_7x7") for name in names)
        cells = net.options["n_cells"]
        units = int(rng.choice(HIDDEN_UNITS[:4]))
        if millions > 0.8 or not net.options["glob_avg"] or large_kernels or cells > 12:
            channels = CHANNELS[0]
        elif millions > 0.4 or cells > 10:
            channels = int(rng.choice(CHANNELS[:2]))
        elif millions > 0.2 or cells > 8:
            channels = int(rng.choice(CHANNELS[:3]))
        else:
            channels = int(rng.choice(CHANNELS))
            if channels <= 64:
                units = int(rng.choice(HIDDEN_UNITS))
        return net.options | {"C": channels, "fc_dim": units}

    def close(self) -> None:
        """Closes the file; reading opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    # ------------------------------------------------------------------------------------------------- one graph

    def _arrays(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if self._file is None:
            self._file = open_hdf5(self.path)
        try:
            stored = self._file[self.split][str(index)]
            adjacency_NN, nodes = np.asarray(stored["adj"][()]), np.asarray(stored["nodes"][()])
        except (KeyError, OSError) as error:
            raise DataError(f"{self.path} holds no graph {self.split}/{index} ({error}); download it again.") from None
        size = len(nodes)
        if adjacency_NN.shape != (size, size) or nodes.ndim != 2 or nodes.shape[1] < 3 or adjacency_NN.diagonal().any():
            raise DataError(
                f"{self.path}: graph {self.split}/{index} has adjacency {adjacency_NN.shape} and nodes {nodes.shape}; "
                "they must be (N, N) with an empty diagonal and (N, 3 or more)."
            )
        return adjacency_NN, nodes

    def _graph(self, adjacency_NN: np.ndarray, nodes: np.ndarray, index: int) -> NetGraph:
        distance_NN = np.where(adjacency_NN > max(self.ve_cutoff, 1), 0, adjacency_NN).astype(np.int16)
        where = f"{self.path}: graph {self.split}/{index}"
        made = [self._node(number, row, len(nodes), where) for number, row in enumerate(nodes.tolist())]
        facts = {"class": "DeepNetwork", "index": index, "split": self.split, "warnings": []}
        return NetGraph(tuple(made), distance_NN, self.ve_cutoff, facts=facts)

    def _node(self, number: int, row: list[int], count: int, where: str) -> Node:
        try:
            kind, name = self._kinds[row[0]], self._names[row[2]]
        except KeyError as error:
            raise DataError(f"{where}: node {number} refers to number {error}, which the JSON file lacks.") from None
        type_name = primitive_of(kind)
        if type_name not in NUMBER or NUMBER[type_name] >= NUM_PRIMITIVES["vision"]:
            raise DataError(f"{where}: node {number} is a {kind!r}, which is no primitive of GHN-2.")
        shape = POOL_SHAPE if "pool" in type_name and not name.startswith("classifier") else None
        is_listed = any(part in type_name for part in LISTED)
        return Node(
            name=parameter_name(name, row[1]) if is_listed else parameter_name(name, row[1]).rstrip("."),
            type=NUMBER[type_name],
            shape=shape,
            listed=is_listed,
            is_last_weight=is_listed and number == count - 2,
            is_last_bias=is_listed and number == count - 1,
        )


def open_hdf5(path: Path) -> Any:
    """The file at ``path``, for reading.

    Raises: ConfigError without h5py, DataError for a file that is not HDF5.
    """
    try:
        h5py = importlib.import_module("h5py")
    except ImportError:
        raise ConfigError(f"{path} is an HDF5 file, which needs h5py: `pip install h5py`.") from None
    try:
        return h5py.File(path, mode="r")
    except OSError as error:
        raise DataError(f"{path} cannot be read as HDF5 ({error}); download it again.") from None


def primitive_of(kind: str) -> str:
    """``conv_3x3`` -> ``conv``, ``sep_conv_5x5`` -> ``sep_conv``, ``fc-b`` -> ``bias``."""
    if kind == "fc-b":
        return "bias"
    return re.sub(r"_\d+x\d+$", "", kind)


def parameter_name(name: str, cell: int) -> str:
    """Name of a stored operation's parameter in the network.

    Stored names are relative to their cell, and older files left out the ``op`` of a sequence inside ``_ops``.
    """
    if name.startswith("classifier"):
        return name
    if name == "":
        return f"cells.{cell}.input"
    if name.endswith("to_out.0."):
        name += "weight"
    name = re.sub(r"(^|\.)_ops\.(\d+)\.(\d+)(?=\.|$)", r"\1_ops.\2.op.\3", name, count=1)
    for part in ("stem", "pos_enc"):
        if part in name:
            return name[name.index(part) :]
    return f"cells.{cell}.{name}"


def with_shapes(graph: NetGraph, shapes: Mapping[str, tuple[int, ...]]) -> NetGraph:
    """``graph`` with the shapes of its parameters; an operation named by a prefix takes the parameter that it begins.

    Args:
        shapes: of a network's parameters, by name.
    """

    def shaped(node: Node) -> Node:
        if not node.listed or node.shape is not None:
            return node
        match = next((name for name in shapes if name.startswith(node.name)), None)
        return node if match is None else replace(node, name=match, shape=tuple(shapes[match]))

    return replace(graph, nodes=tuple(shaped(node) for node in graph.nodes))
